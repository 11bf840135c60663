"""What the images in shards are: formats, sizes, colours, faults, duplicates."""

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from data.errors import DataError
from data.images.decode import Kind, kind, verify
from data.index.index import ShardIndex
from data.storage.read import read

CHUNK = 64  # samples that a process looks at between two answers
MAX_PIXELS = 1 << 20  # of an image that enter mean and deviation: a regular grid of a larger one


class Look(NamedTuple):
    """One sample to be looked at."""

    sample: int
    tar: str
    offset: int
    size: int
    decode: bool


class Seen(NamedTuple):
    """What one sample is. Without a header or, when it was to be decoded, without moments it is unreadable."""

    sample: int
    hash: int
    header: Kind | None
    moments: np.ndarray | None  # [2, C] means of the values and of their squares by channel, in 0 … 1
    fault: str


def looks(index: ShardIndex, samples: np.ndarray, decoded: np.ndarray) -> Iterator[list[Look]]:
    """The samples in tasks for `look`."""
    for start in range(0, len(samples), CHUNK):
        chunk = samples[start : start + CHUNK]
        decode = np.isin(chunk, decoded)
        task = []
        for sample, wanted in zip(chunk.tolist(), decode.tolist(), strict=True):
            shard, offset, size = index.locate(sample)
            task.append(Look(sample, index.shards[shard], offset, size, wanted))
        yield task


def look(task: list[Look], tick: Callable[[], None]) -> list[Seen]:
    """What each sample is, in the order of the task."""
    seen = []
    for sample, tar, offset, size, decode in task:
        hashed, header, moments, fault = 0, None, None, ""
        try:
            data = read(tar, offset, size)
            hashed = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
            header = kind(data)
            moments = _moments(verify(data)) if decode else None
        except DataError as error:
            fault = str(error)
        seen.append(Seen(sample, hashed, header, moments, fault))
        tick()
    return seen


def _moments(pixels: np.ndarray) -> np.ndarray:
    step = math.isqrt(max(1, pixels.shape[0] * pixels.shape[1] // MAX_PIXELS))
    values = pixels[::step, ::step].reshape(-1, pixels.shape[2]).astype(np.float32) / 255
    return np.stack([values.mean(axis=0, dtype=np.float64), (values**2).mean(axis=0, dtype=np.float64)])


class Survey:
    """Sums over what was seen: a few bytes for each image, so that millions are no matter."""

    def __init__(self) -> None:
        self.forms: Counter[str] = Counter()
        self.modes: Counter[str] = Counter()
        self.sides: Counter[int] = Counter()  # shorter sides
        self.least: Kind | None = None
        self.most: Kind | None = None
        self.faults: list[tuple[int, str]] = []
        self.read = self.decoded = 0
        self.sums: dict[int, np.ndarray] = {}  # moments of all images of so many channels
        self.images: Counter[int] = Counter()  # of so many channels
        self._hashes, self._samples = array("Q"), array("Q")

    def add(self, seen: Seen) -> None:
        self.read += 1
        if seen.fault:
            self.faults.append((seen.sample, seen.fault))
        if seen.hash:
            self._hashes.append(seen.hash)
            self._samples.append(seen.sample)
        if header := seen.header:
            self.forms[header.form] += 1
            self.modes[header.mode] += 1
            self.sides[min(header.height, header.width)] += 1
            self.least = min(self.least or header, header, key=_area)
            self.most = max(self.most or header, header, key=_area)
        if seen.moments is not None:
            self.decoded += 1
            channels = seen.moments.shape[1]
            self.images[channels] += 1
            self.sums[channels] = self.sums.get(channels, 0) + seen.moments

    def colours(self) -> tuple[list[float], list[float]] | None:
        """Mean and deviation by channel in 0 … 1, each image weighing the same; one channel if all are grey.

        Of images with different numbers of channels the most frequent ones count.
        """
        if not self.decoded:
            return None
        (channels, images), *_ = self.images.most_common()
        mean, square = self.sums[channels] / images
        std = np.sqrt(np.maximum(square - mean**2, 0))
        shown = 1 if set(self.modes) <= {"1", "L", "LA", "I", "I;16"} else channels
        return mean[:shown].tolist(), std[:shown].tolist()

    def duplicates(self) -> list[list[int]]:
        """Groups of samples whose images are the same, byte for byte."""
        hashes, samples = np.frombuffer(self._hashes, np.uint64), np.frombuffer(self._samples, np.uint64)
        values, counts = np.unique(hashes, return_counts=True)
        groups = [samples[hashes == value].astype(np.int64).tolist() for value in values[counts > 1]]
        return sorted(sorted(group) for group in groups)

    def median_side(self) -> int:
        sides, counts = np.array(sorted(self.sides.items()), np.int64).T
        return int(sides[np.searchsorted(np.cumsum(counts), counts.sum() / 2)])


def _area(header: Kind) -> int:
    return header.height * header.width


def classes_of(index: ShardIndex) -> dict[str, Any]:
    """How many samples each label has, and how many bytes the images."""
    labels: Counter[int] = Counter()
    size = 0
    for shard in range(len(index.shards)):
        table = index.table(shard)
        labels.update(dict(zip(*(part.tolist() for part in np.unique(table[:, 3], return_counts=True)), strict=True)))
        size += int(table[:, 1].sum())
    unlabelled = labels.pop(-1, 0)
    return {"labels": dict(sorted(labels.items())), "unlabelled": unlabelled, "image_bytes": size}
