"""`torch.export` programs: an encoder for `torch.export.load(FILE).module()`, without this package."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae.formats.format import Comparison, Export, Format
from mae.formats.graph import describe_shapes, trace


def write(export: Export, file: Path) -> dict[str, Any]:
    torch.export.save(trace(export), file)
    return {"call": f'torch.export.load("{file.name}").module()'} | describe_shapes(export)


def compare(export: Export, file: Path, images: Tensor) -> Iterator[Comparison]:
    yield Comparison(torch.export.load(file).module()(images), export.features(images))


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
