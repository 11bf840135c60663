"""Map-style dataset: the samples of one micro-batch → a batch of uint8 or uint16 images.

For each sample, in a worker process:

1 locate   sample number → (shard, offset, size)                          data/index
2 read     those bytes, from disk or from the local copy of the shard     data/storage
3 crop     a box per view, from the header and (seed, epoch, position)    data/images/crops.py
4 decode   only that box, resized → [C, H, W]                             data/images/decode.py
5 augment  flip, RandAugment                                              data/images/augment.py
6 write    into the sample's rows of the batch: a slot of the ring, or new memory

A sample that fails in 2 to 4 is listed under "bad", and replaced, or missing in the batch where each counts once. The
result does not depend on the worker.
"""

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.errors import DataError, NoObject
from data.images.crops import DRAWS, Box, centre_crop, flipped, library_seed, random_resized_crop
from data.images.decode import decode, read_header
from data.index.index import ShardIndex
from data.loader.shared_batches import Ring
from data.order import hashing
from data.order.samplers import MicroBatch

Batch = dict[str, Any]
Uniforms = list[list[float]] | None  # for each view its numbers in [0, 1); None where nothing is drawn
TRIES_IN_SHARD, MAX_TRIES = 4, 8  # replacements come from the same shard first, then from any shard
MAX_DRAWN = 512  # replacements, where photographs without an object are among them: these do not count as tries


class CropSpec(NamedTuple):
    """Size, channels, crop and augmentation of the images of a batch."""

    size: tuple[int, int]  # height, width
    channels: int = 3
    scale: tuple[float, float] = (0.2, 1.0)  # share of the area that a random crop keeps
    flip: bool = True
    keep: float = 1.0  # share of the shorter side that a centre crop keeps
    views: int = 1  # random crops of one decoded image, in neighbouring rows
    exact: bool = False  # never decode at a reduced scale
    bits: int = 8
    augment: Callable[[Tensor, int], Tensor] | None = None  # (random crop, seed) → crop

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.channels, *self.size

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        return np.uint8 if self.bits == 8 else np.uint16


class ShardDataset(Dataset[Batch]):
    """Map-style dataset over indexed shards: micro-batch → batch.

    seed     of the random crops and flips, which follow from (seed, epoch, position); None for centre crops
    replace  put another sample in the place of one that cannot be read; else its row is missing in the batch

    returns  images Tensor uint8 or uint16 [B, C, H, W], or the slot of the ring that holds them; arrays labels int64
             [B] (-1 unknown), positions, samples int64 [B], boxes int32 [B, 4] (top, left, height, width of the crop
             in the upright image); keys list[str]; bad: a record of each sample that could not be read

    Replacements follow from (seed, epoch, position) alone. Raises DataError if they cannot be read either.
    """

    def __init__(self, index: ShardIndex, spec: CropSpec, seed: int | None = None, replace: bool = True):
        self.index, self.spec, self.seed, self.replace = index, spec, seed, replace
        # A ShardLoader with workers sets these before it forks them.
        self.ring: Ring | None = None
        self.reading = np.zeros((1, 2), np.int64)  # [workers, 2]: process and present sample of each worker
        self.worker = 0

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        epoch, positions, wanted, slot = micro_batch
        count, samples = len(wanted), wanted.copy()
        images = self.empty_images(count) if slot is None or not self.ring else self.ring.slot(slot, count)
        uniforms = None if self.seed is None else hashing.uniforms(self.seed, epoch, positions, DRAWS).tolist()
        views = self.spec.views if uniforms else 1
        loaded, bad, kept = [], [], []
        for row in range(0, count, views):
            rows = slice(len(kept), len(kept) + views)
            drawn = uniforms and uniforms[row : row + views]
            if (found := self._load_or_replace(images[rows], micro_batch, row, drawn, bad)) is None:
                continue
            samples[rows], boxes = found
            loaded.append(boxes)
            kept += range(row, row + views)
        samples, positions = samples[: len(kept)], positions[kept]
        return {
            "images" if slot is None else "slot": images[: len(kept)] if slot is None else slot,
            **self._collate(samples, loaded),
            "positions": positions,
            "samples": samples,
            "keys": [self.index.key(sample) for sample in samples],
            "bad": bad,
        }

    def empty_images(self, count: int) -> Tensor:
        """Allocates the images of a batch."""
        return torch.from_numpy(np.empty((count, *self.spec.shape), self.spec.dtype))

    def decode_views(self, rows: Tensor, data: bytes, uniforms: Uniforms) -> list[Box]:
        """Writes one random crop per view into `rows`, the centre crop if `uniforms` is None. Returns the boxes."""
        spec, header = self.spec, read_header(data, self.spec.channels)
        views = uniforms or [None]
        boxes = [self._choose_box(header.height, header.width, u) for u in views]
        crops = decode(data, header, boxes, spec.size, spec.channels, exact=spec.exact, bits=spec.bits)
        for row, crop, u in zip(rows, crops, views, strict=True):
            row.copy_(crop if u is None else self._augment(crop, u))
        return boxes

    def _load_or_replace(
        self, rows: Tensor, micro_batch: MicroBatch, row: int, uniforms: Uniforms, bad: list[dict[str, Any]]
    ) -> tuple[int, Any] | None:
        """Loads one sample; on DataError records it in `bad` and tries its replacements.

        Returns the number of the sample that was read and what `_load` says of it; None if nothing shall replace it.
        """
        epoch, position, wanted = micro_batch.epoch, int(micro_batch.positions[row]), int(micro_batch.samples[row])
        damaged = 0
        for sample in chain([wanted], self._replacements(wanted, epoch, position)):
            self.reading[self.worker, 1] = sample
            try:
                return sample, self._load(rows, sample, uniforms)
            except DataError as error:
                shard, key = self.index.shards[self.index.shard_of(sample)], self.index.key(sample)
                record = {"shard": shard, "key": key, "reason": str(error), "epoch": epoch, "position": position}
                bad.append(record | ({"damaged": False} if isinstance(error, NoObject) else {}))
                if not self.replace:
                    return None
                damaged += not isinstance(error, NoObject)
                if damaged > MAX_TRIES:
                    break
        raise DataError(
            f"neither the sample at position {position} of epoch {epoch} nor one tried in its place can be read; "
            f"the last is {bad[-1]['key']} of {bad[-1]['shard']}: {bad[-1]['reason']}"
        )

    def _replacements(self, sample: int, epoch: int, position: int) -> Iterator[int]:
        """Yields up to MAX_DRAWN other samples, drawn from (seed, epoch, position)."""
        key = hashing.key(self.seed or 0, hashing.REPLACE, epoch, position)
        numbers = hashing.hashes(key, np.arange(MAX_DRAWN)).tolist()
        first, count = self.index.shard_range(sample)
        if count > 1:
            for number in numbers[:TRIES_IN_SHARD]:
                yield first + (sample - first + 1 + number % (count - 1)) % count
        for number in numbers[TRIES_IN_SHARD:]:
            yield number % len(self.index)

    def _load(self, rows: Tensor, sample: int, uniforms: Uniforms) -> Any:
        """Reads one sample and writes its views into `rows`. Returns its part of what `_collate` makes."""
        return self.decode_views(rows, self.index.read(sample), uniforms)

    def _choose_box(self, height: int, width: int, u: list[float] | None) -> Box:
        spec = self.spec
        if u is None:
            return centre_crop(height, width, spec.size, spec.keep)
        # Relative to the aspect of the result, so that a rectangular one is stretched no more than a square one.
        aspect = spec.size[1] / spec.size[0]
        return random_resized_crop(height, width, u, spec.scale, (3 / 4 * aspect, 4 / 3 * aspect))

    def _augment(self, crop: Tensor, u: list[float]) -> Tensor:
        if self.spec.flip and flipped(u):
            # torch 2.11 cannot flip uint16.
            crop = crop.view(torch.int16).flip(-1).view(crop.dtype) if crop.dtype == torch.uint16 else crop.flip(-1)
        return crop if self.spec.augment is None else self.spec.augment(crop, library_seed(u))

    def _collate(self, samples: np.ndarray, loaded: list[Any]) -> Batch:
        """Returns the labels and boxes of a batch, `loaded` being the boxes of each sample."""
        return {
            "labels": np.array([self.index.label(sample) for sample in samples], np.int64),
            "boxes": np.array(loaded, np.int32).reshape(-1, 4),
        }
