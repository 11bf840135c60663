"""`torch.export` programs: a model for `torch.export.load(FILE).module()`, without this package; also for ONNX."""

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from mae.errors import ConfigError
from mae.formats.format import Comparison, Export, Format
from mae.models.attention import set_attention
from mae.models.classifier import Classifier
from mae.sam.encoder import SamEncoder

INPUT, BATCH = "images", "batch"


def write(export: Export, file: Path) -> dict[str, Any]:
    said: dict[str, Any] = {"weights": export.weights} if export.weights else {}
    torch.export.save(trace(export), file, extra_files=said)
    return {"call": f'torch.export.load("{file.name}").module()'} | describe_shapes(export)


def compare(export: Export, file: Path, images: Tensor) -> Iterator[Comparison]:
    yield Comparison(torch.export.load(file).module()(images), export.outputs(images))


class Graph(nn.Module):
    """The outputs of an export as a module: float32 in and out, whatever precision is inside."""

    def __init__(self, export: Export) -> None:
        super().__init__()
        model = deepcopy(export.model).half() if export.half else export.model
        self.export = replace(export, model=model)
        self.model = model  # its parameters are this module's
        self.dtype = torch.float16 if export.half else torch.float32

    def forward(self, images: Tensor) -> Tensor:
        return self.export.outputs(images.to(self.dtype)).float()


@torch.no_grad()
def trace(export: Export) -> ExportedProgram:
    """Traces the model with torch.export, for images of its size in batches of any size.

    Attention stays one operation, which each device does in its own way.

    Raises ConfigError if a weight is too large for half precision.
    """
    config, graph = export.model.config, Graph(export)
    if too_large := [key for key, value in graph.model.state_dict().items() if not value.isfinite().all()]:
        raise ConfigError(f"--half: {', '.join(too_large[:8])} have values above 65504, the largest of float16")
    set_attention(graph, fused=True)
    # A batch of two, because torch.export takes a size of one for a constant.
    images = torch.zeros(2, config.in_channels, *config.image_size)
    program = torch.export.export(graph, (images,), dynamic_shapes={INPUT: {0: Dim(BATCH)}})
    set_attention(graph, fused=None)
    return program


def output_name(export: Export) -> str:
    return "scores" if isinstance(export.model, Classifier) else "features"


def describe_shapes(export: Export) -> dict[str, Any]:
    """Returns names and shapes of the graph's input and output, for the card."""
    config = export.model.config
    if isinstance(export.model, SamEncoder):
        output = [export.sam.config.out_channels, *export.sam.config.grid]
    elif isinstance(export.model, Classifier):
        output = [export.model.classes]
    else:
        output = [export.encoder.config.patches + export.encoder.config.class_tokens, export.encoder.config.width]
    return {
        "input": [INPUT, BATCH, config.in_channels, *config.image_size],
        "output": [output_name(export), BATCH, *output],
        "precision": "float16 inside, float32 in and out" if export.half else "float32",
    }


FORMAT = Format(
    sentence="torch.export program, batches of any size: the encoder, or a classifier",
    suffix=".pt2",
    peer="torch",
    write=write,
    compare=compare,
    read_back=False,
    heads=True,
    halves=True,
)

SAM = replace(
    FORMAT,
    sentence="torch.export program, batches of any size: a SAM-style encoder",
    compared="image embeddings",
    holds="sam",
    heads=False,
)
