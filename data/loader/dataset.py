"""From draws to batches of images as integers."""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.errors import DataError
from data.images.crops import DRAWS, Box, centre_crop, flipped, library_seed, random_resized_crop
from data.images.decode import decode, read_header
from data.index.index import ShardIndex
from data.loader.shared_batches import Ring
from data.order.hashing import REPLACE, hashes, key, uniforms
from data.order.samplers import MicroBatch
from data.storage.read import read

Batch = dict[str, Any]
# Others that are tried in the place of a sample that cannot be read: of its shard, then of any.
SAME_SHARD, ANY_SHARD = 4, 8


class Cut(NamedTuple):
    """How images become rows of a batch."""

    size: tuple[int, int]  # height, width
    channels: int = 3
    scale: tuple[float, float] = (0.2, 1.0)  # share of the area that a random crop keeps
    flip: bool = True
    keep: float = 1.0  # share of the shorter side that a centre crop keeps
    views: int = 1  # random crops from one decoded image: neighbouring rows
    exact: bool = False  # never decode at a reduced scale
    bits: int = 8
    augment: Callable[[Tensor, int], Tensor] | None = None  # of a random crop, with a seed

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, *self.size

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        return np.uint8 if self.bits == 8 else np.uint16


class ShardDataset(Dataset[Batch]):
    """A map from draws to batches.

    seed     of the random crops and flips, which follow from (seed, epoch, position); None for centre crops
    ring     where images go if the draw names a slot; the batch then holds `slot` in the place of `images`
    reading  [workers, 2] int64: process and present sample of each worker, for whoever outlives it

    returns  images Tensor uint8 or uint16 [B, C, H, W]; arrays labels int64 [B] (-1 unknown), positions, samples
             int64 [B], boxes int32 [B, 4] (top, left, height, width of the crop in the upright image); keys list[str];
             bad: a record of each sample that could not be read and was replaced

    A sample that cannot be read is replaced by one that follows from (seed, epoch, position) alone.
    DataError: the replacements cannot be read either.
    """

    def __init__(
        self,
        index: ShardIndex,
        cut: Cut,
        seed: int | None = None,
        ring: Ring | None = None,
        reading: np.ndarray | None = None,
    ):
        self.index, self.cut, self.seed, self.ring = index, cut, seed, ring
        self.reading = np.zeros((1, 2), np.int64) if reading is None else reading
        self.worker = 0

    def __getitem__(self, draw: MicroBatch) -> Batch:
        cut, count = self.cut, len(draw.samples)
        images = self.empty(count) if draw.slot is None or not self.ring else self.ring.slot(draw.slot, count)
        draws = None if self.seed is None else uniforms(self.seed, draw.epoch, draw.positions, DRAWS).tolist()
        samples, boxes, bad = draw.samples.copy(), np.empty((count, 4), np.int32), []
        views = cut.views if draws else 1
        for row in range(0, count, views):
            rows = slice(row, row + views)
            samples[rows], boxes[rows] = self._fill(images[rows], draw, row, draws and draws[rows], bad)
        return {
            "images" if draw.slot is None else "slot": images if draw.slot is None else draw.slot,
            "labels": np.array([self.index.label(sample) for sample in samples]),
            "positions": draw.positions,
            "samples": samples,
            "boxes": boxes,
            "keys": [self.index.key(sample) for sample in samples],
            "bad": bad,
        }

    def empty(self, count: int) -> Tensor:
        """Room for the images of a batch."""
        return torch.from_numpy(np.empty((count, *self.cut.shape), self.cut.dtype))

    def _fill(
        self, images: Tensor, draw: MicroBatch, row: int, draws: Any, bad: list[dict[str, Any]]
    ) -> tuple[int, Any]:
        """Writes the views of one sample, or of the first replacement that can be read: its number and what `_read`
        returns, here the boxes."""
        position, wanted = int(draw.positions[row]), int(draw.samples[row])
        for sample in chain([wanted], self._replacements(wanted, draw.epoch, position)):
            self.reading[self.worker, 1] = sample
            try:
                return sample, self._read(images, sample, draws)
            except DataError as error:
                bad.append(self._record(sample, draw.epoch, position, error))
        raise DataError(
            f"neither the sample at position {position} of epoch {draw.epoch} nor one tried in its place can be read; "
            f"the last is {bad[-1]['key']} of {bad[-1]['shard']}: {bad[-1]['reason']}"
        )

    def _read(self, images: Tensor, sample: int, draws: Any) -> Any:
        shard, offset, size = self.index.locate(sample)
        return self.fill(images, read(self.index.shards[shard], offset, size, self.index.cache), draws)

    def fill(self, images: Tensor, data: bytes, draws: list[list[float]] | None) -> list[Box]:
        """Writes the views of an encoded image that the draws choose, None for the centre; returns their boxes."""
        cut, header = self.cut, read_header(data, self.cut.channels)
        boxes = [self._box(header.height, header.width, u) for u in draws or [None]]
        crops = decode(data, header, boxes, cut.size, cut.channels, exact=cut.exact, bits=cut.bits)
        for image, crop, u in zip(images, crops, draws or [None], strict=True):
            image.copy_(crop if u is None else self._varied(crop, u))
        return boxes

    def _varied(self, crop: Tensor, u: list[float]) -> Tensor:
        if self.cut.flip and flipped(u):
            crop = _mirrored(crop)
        return crop if self.cut.augment is None else self.cut.augment(crop, library_seed(u))

    def _box(self, height: int, width: int, u: list[float] | None) -> Box:
        cut = self.cut
        if u is None:
            return centre_crop(height, width, cut.size, cut.keep)
        # Relative to the aspect of the result, so that a rectangular one is stretched no more than a square one.
        aspect = cut.size[1] / cut.size[0]
        return random_resized_crop(height, width, u, cut.scale, (3 / 4 * aspect, 4 / 3 * aspect))

    def _replacements(self, sample: int, epoch: int, position: int) -> Iterator[int]:
        """Others of the same shard, then of any, in an order that does not depend on who reads."""
        numbers = hashes(key(self.seed or 0, REPLACE, epoch, position), np.arange(ANY_SHARD))
        first, count = self.index.shard_range(sample)
        for attempt, number in enumerate(numbers.tolist()):
            if attempt < SAME_SHARD and count > 1:
                yield first + (sample - first + 1 + number % (count - 1)) % count
            elif attempt >= SAME_SHARD:
                yield number % len(self.index)

    def _record(self, sample: int, epoch: int, position: int, error: DataError) -> dict[str, Any]:
        shard, _, _ = self.index.locate(sample)
        return {
            "shard": self.index.shards[shard],
            "key": self.index.key(sample),
            "reason": str(error),
            "epoch": epoch,
            "position": position,
        }


def _mirrored(image: Tensor) -> Tensor:
    # `flip` knows no uint16 in torch 2.11.
    return image.view(torch.int16).flip(-1).view(image.dtype) if image.dtype == torch.uint16 else image.flip(-1)
