"""Whole photographs with a map beside each, for dense evaluation, one by one.

1 find    KEY.EXTENSION of a sample, as data.label_maps or data.depth_maps names it       data/index
2 decode  the photograph, resized; its map, of the size that it has                       data/images
3 leave   a sample without a map, with one of another size, or that cannot be read: its reason stands in its place
"""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from data.datamodule import ShardDataModule
from data.errors import DataError
from data.images import decode
from data.images.label_maps import read_classes, read_depths
from data.index.index import ShardIndex
from data.index.samples import split_name
from data.loader.loader import SETTLE_SECONDS, explain_worker_death, init_worker
from data.storage.read import read

Target = Literal["classes", "depth"]
Size = tuple[int, int]
SETTINGS: dict[Target, str] = {"classes": "label_maps", "depth": "depth_maps"}


class Photograph(NamedTuple):
    """A whole photograph and its map; `reason` says why there is neither, and is "" otherwise.

    image   uint8 or uint16 [C, h, w], resized
    truth   [H, W], of the photograph's own size: classes uint8 or uint16, or metres float32, 0 where unknown
    """

    sample: int
    key: str
    image: np.ndarray
    truth: np.ndarray
    reason: str = ""


class MappedPhotographs(Dataset[Photograph]):
    """Map-style dataset of samples with a map.

    target  "classes" or "depth"
    size    (height, width) of a photograph → those to which it is resized
    unit    metres of 1 in depth maps of whole numbers
    """

    def __init__(
        self,
        data: ShardDataModule,
        index: ShardIndex,
        samples: np.ndarray,
        target: Target,
        size: Callable[[int, int], Size],
        unit: float,
    ) -> None:
        self.index, self.samples, self.size, self.spec = index, samples, size, data.crop
        self.target: Target = target
        self.unit = unit
        self.extension = require_extension(data, target)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, row: int) -> Photograph:
        sample = int(self.samples[row])
        key = self.index.key(sample)
        try:
            return Photograph(sample, key, *self._read(sample, key))
        except DataError as error:
            nothing = np.zeros(0, np.uint8)
            return Photograph(sample, key, nothing, nothing, str(error))

    def _read(self, sample: int, key: str) -> tuple[np.ndarray, np.ndarray]:
        data, channels = self.index.read(sample), self.spec.channels
        header = decode.read_header(data, channels)
        truth = self._read_map(sample, key)
        if truth.shape != header[:2]:
            raise DataError(
                f"{key}.{self.extension} has {truth.shape[0]}x{truth.shape[1]} pixels and its photograph "
                f"{header.height}x{header.width}: a map has the size of its photograph"
            )
        box = (0, 0, header.height, header.width)
        size = self.size(header.height, header.width)
        (image,) = decode.decode(data, header, [box], size, channels, exact=True, bits=self.spec.bits)
        return image.numpy(), truth

    def _read_map(self, sample: int, key: str) -> np.ndarray:
        members = self.index.members(sample)
        found = next((member for member in members if split_name(member.name)[1].lower() == self.extension), None)
        if found is None:
            has = ", ".join(f".{split_name(member.name)[1]}" for member in members)
            raise DataError(f"it has no {key}.{self.extension} beside it, only {has}")
        tar = self.index.shards[self.index.shard_of(sample)]
        data = read(tar, found.offset, found.size, self.index.cache)
        return read_classes(data) if self.target == "classes" else read_depths(data, self.unit)


def require_extension(data: ShardDataModule, target: Target) -> str:
    """Returns the extension of the maps. Raises DataError if the settings name none."""
    extension = getattr(data.config, SETTINGS[target])
    if extension is None:
        example = "png, where KEY.png has the class of each pixel of KEY.jpg" if target == "classes" else "depth.png"
        raise DataError(f"no maps of {target} are named: set data.{SETTINGS[target]}, such as {example}")
    return extension


def load(photographs: MappedPhotographs, workers: int) -> Iterator[Photograph]:
    """Yields the photographs in their order, read by so many processes, none in memory beyond a few."""
    forks = workers > 0 and "fork" in multiprocessing.get_all_start_methods()
    if forks and torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(SETTLE_SECONDS)  # see ShardLoader
    loader = DataLoader(
        photographs,
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=workers if forks else 0,
        worker_init_fn=init_worker,
        multiprocessing_context="fork" if forks else None,
    )
    with explain_worker_death():
        yield from loader


def _unchanged(photograph: Any) -> Any:
    """Keeps torch from making tensors of the arrays in the worker and passing each on by a file descriptor."""
    return photograph
