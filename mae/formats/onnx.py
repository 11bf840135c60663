"""ONNX files: an encoder for onnxruntime and other libraries."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae.formats.format import Comparison, Export, Format
from mae.formats.pt2 import INPUT, OUTPUT, describe_shapes, trace

# A protobuf ends at 2 GiB; weights that come near it lie in a file of their own beside the graph.
MAX_BYTES_INSIDE = 1_800_000_000


def write(export: Export, file: Path) -> dict[str, Any]:
    weights = sum(value.numel() * value.element_size() for value in export.model.state_dict().values())
    torch.onnx.export(
        trace(export),
        (),
        file,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamo=True,
        external_data=weights > MAX_BYTES_INSIDE,
        verbose=False,
    )
    return describe_shapes(export)


def compare(export: Export, file: Path, images: Tensor) -> Iterator[Comparison]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (features,) = session.run([OUTPUT], {INPUT: images.numpy()})
    yield Comparison(torch.from_numpy(features), export.features(images))


FORMAT = Format(
    sentence="ONNX, batches of any size, weights above 2 GB beside it: the encoder",
    suffix=".onnx",
    peer="onnxruntime",
    write=write,
    compare=compare,
    read_back=False,
    needs=("onnx", "onnxscript", "onnxruntime"),
)

SAM = replace(
    FORMAT,
    sentence="ONNX, batches of any size, weights above 2 GB beside it: a SAM-style encoder",
    compared="image embeddings",
    holds="sam",
)
