"""ONNX files: an encoder or classifier for onnxruntime and other libraries."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae.formats.format import Comparison, Export, Format
from mae.formats.pt2 import BATCH, INPUT, describe_shapes, output_name, trace
from mae.models.classifier import Classifier

# A protobuf ends at 2 GiB; weights that come near it lie in a file of their own beside the graph.
MAX_BYTES_INSIDE = 1_800_000_000


def write(export: Export, file: Path) -> dict[str, Any]:
    weights = sum(value.numel() * (2 if export.half else 4) for value in export.model.state_dict().values())
    program = torch.onnx.export(
        trace(export),
        (),
        input_names=[INPUT],
        output_names=[output_name(export)],
        dynamic_shapes={INPUT: {0: BATCH}},  # the name of the axis in the file
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    if isinstance(export.model, Classifier) and export.model.class_names:
        program.model.metadata_props["label_names"] = json.dumps(export.model.class_names)
    if export.weights:
        program.model.metadata_props["weights"] = export.weights
    program.save(file, external_data=weights > MAX_BYTES_INSIDE)
    return describe_shapes(export)


def compare(export: Export, file: Path, images: Tensor) -> Iterator[Comparison]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (outputs,) = session.run([output_name(export)], {INPUT: images.numpy()})
    yield Comparison(torch.from_numpy(outputs), export.outputs(images))


FORMAT = Format(
    sentence="ONNX, batches of any size, weights above 2 GB beside it: the encoder, or a classifier",
    suffix=".onnx",
    peer="onnxruntime",
    write=write,
    compare=compare,
    read_back=False,
    heads=True,
    halves=True,
    needs=("onnx", "onnxscript", "onnxruntime"),
)

SAM = replace(
    FORMAT,
    sentence="ONNX, batches of any size, weights above 2 GB beside it: a SAM-style encoder",
    compared="image embeddings",
    holds="sam",
    heads=False,
)
