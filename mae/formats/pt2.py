"""`torch.export` programs: an encoder for `torch.export.load(FILE).module()`, without this package; also for ONNX."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mae.formats.format import Comparison, Export, Format
from mae.models.vit import Encoder, choose_attention
from mae.sam.encoder import SamEncoder

INPUT, OUTPUT = "images", "features"


def write(export: Export, file: Path) -> dict[str, Any]:
    torch.export.save(trace(export), file)
    return {"call": f'torch.export.load("{file.name}").module()'} | describe_shapes(export)


def compare(export: Export, file: Path, images: Tensor) -> Iterator[Comparison]:
    yield Comparison(torch.export.load(file).module()(images), export.features(images))


class Features(nn.Module):
    """A plain encoder whose forward pass is `encode`."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.encode(images)


@torch.no_grad()
def trace(export: Export) -> ExportedProgram:
    """Traces the encoder with torch.export, for images of its size in batches of any size.

    Attention stays one operation, which each device does in its own way.
    """
    config = export.model.config
    if isinstance(export.model, SamEncoder):
        model = export.model
    else:
        choose_attention(export.encoder, device=torch.device("cuda"))
        model = Features(export.encoder)
    # A batch of two, because torch.export takes a size of one for a constant.
    images = torch.zeros(2, config.in_channels, *config.image_size)
    return torch.export.export(model, (images,), dynamic_shapes={INPUT: {0: Dim("batch")}})


def describe_shapes(export: Export) -> dict[str, list[str | int]]:
    """Returns names and shapes of the graph's input and output, for the card."""
    config = export.model.config
    if isinstance(export.model, SamEncoder):
        output = [export.sam.config.out_channels, *export.sam.config.grid]
    else:
        output = [export.encoder.config.patches + export.encoder.config.class_token, config.width]
    return {"input": [INPUT, "batch", config.in_channels, *config.image_size], "output": [OUTPUT, "batch", *output]}


FORMAT = Format(
    sentence="torch.export program, batches of any size: the encoder",
    suffix=".pt2",
    peer="torch",
    write=write,
    compare=compare,
    read_back=False,
)

SAM = replace(
    FORMAT,
    sentence="torch.export program, batches of any size: a SAM-style encoder",
    compared="image embeddings",
    holds="sam",
)
