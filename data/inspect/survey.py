"""Examines images in several processes and sums up formats, sizes, colours, faults and duplicates."""

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from data.errors import DataError
from data.images.decode import Kind, kind, verify
from data.index.index import ShardIndex
from data.storage.read import read

CHUNK = 64  # samples that a process examines between two answers
Target = tuple[int, str, int, int, bool]  # one sample to be examined: number, tar, offset, size, whether to decode it
MAX_PIXELS = 1 << 20  # pixels of an image that enter mean and deviation, on a regular grid


class Pixels(NamedTuple):
    """Statistics of the pixels of an image, of MAX_PIXELS at most."""

    moments: np.ndarray  # [2, C] means of the values and of their squares by channel, in 0 … 1
    bits: int  # 8 or 16, as stored
    lowest: int
    highest: int
    constant: bool  # all pixels are equal


class Finding(NamedTuple):
    """Findings about one sample; it is corrupt if it has a fault."""

    sample: int
    hash: int  # of the encoded image, 0 if it could not be read
    header: Kind | None
    pixels: Pixels | None  # if it was decoded
    fault: str


def chunks(index: ShardIndex, samples: np.ndarray, decoded: np.ndarray) -> Iterator[list[Target]]:
    """Yields the samples in portions for `examine`."""
    for start in range(0, len(samples), CHUNK):
        chunk = samples[start : start + CHUNK]
        targets = []
        for sample, decode in zip(chunk.tolist(), np.isin(chunk, decoded).tolist(), strict=True):
            shard, offset, size = index.locate(sample)
            targets.append((sample, index.shards[shard], offset, size, decode))
        yield targets


def examine(targets: list[Target], advance: Callable[[], None]) -> list[Finding]:
    """Reads the samples, decodes some of them, and returns what was found. Calls `advance` after each sample."""
    findings = []
    for sample, tar, offset, size, decode in targets:
        findings.append(find(sample, partial(read, tar, offset, size), decode))
        advance()
    return findings


def find(sample: int, read_image: Callable[[], bytes], decode: bool) -> Finding:
    """Returns what is found about one sample, whose image is decoded if wanted."""
    hashed, header, pixels, fault = 0, None, None, ""
    try:
        data = read_image()
        hashed = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
        header = kind(data)
        pixels = _measure(verify(data, bits=None)) if decode else None
    except DataError as error:
        fault = str(error)
    return Finding(sample, hashed, header, pixels, fault)


def _measure(pixels: np.ndarray) -> Pixels:
    step = math.isqrt(max(1, pixels.shape[0] * pixels.shape[1] // MAX_PIXELS))
    stored = pixels[::step, ::step].reshape(-1, pixels.shape[2])
    values = stored.astype(np.float32) / np.iinfo(pixels.dtype).max
    moments = np.stack([values.mean(axis=0, dtype=np.float64), (values**2).mean(axis=0, dtype=np.float64)])
    # Few images need the second look, at all pixels.
    constant = bool((stored[:9] == stored[0]).all()) and bool((pixels == pixels[0, 0]).all())
    return Pixels(moments, 8 * pixels.itemsize, int(stored.min()), int(stored.max()), constant)


class Survey:
    """Sums over the findings: a few bytes for each image, so that millions fit in memory."""

    def __init__(self) -> None:
        self.forms: Counter[str] = Counter()
        self.modes: Counter[str] = Counter()
        self.sides: Counter[int] = Counter()  # shorter sides in pixels
        self.smallest: Kind | None = None
        self.largest: Kind | None = None
        self.faults: list[tuple[int, str]] = []
        self.constant: list[int] = []
        self.ranges: dict[int, tuple[int, int]] = {}  # lowest and highest value, by the bits of the images
        self.read = self.decoded = 0
        self.moments: dict[int, np.ndarray] = {}  # sums over all images, by their number of channels
        self.images: Counter[int] = Counter()  # by their number of channels
        self._hashes, self._samples = array("Q"), array("Q")

    def add(self, finding: Finding) -> None:
        self.read += 1
        if finding.fault:
            self.faults.append((finding.sample, finding.fault))
        if finding.hash:
            self._hashes.append(finding.hash)
            self._samples.append(finding.sample)
        if header := finding.header:
            self.forms[header.form] += 1
            self.modes[header.mode] += 1
            self.sides[min(header.height, header.width)] += 1
            self.smallest = min(self.smallest or header, header, key=_area)
            self.largest = max(self.largest or header, header, key=_area)
        if pixels := finding.pixels:
            self.decoded += 1
            channels = pixels.moments.shape[1]
            self.images[channels] += 1
            self.moments[channels] = self.moments.get(channels, 0) + pixels.moments
            lowest, highest = self.ranges.get(pixels.bits, (pixels.lowest, pixels.highest))
            self.ranges[pixels.bits] = min(lowest, pixels.lowest), max(highest, pixels.highest)
            if pixels.constant:
                self.constant.append(finding.sample)

    def colours(self) -> tuple[list[float], list[float]] | None:
        """Returns mean and standard deviation by channel in 0 … 1, every image with the same weight.

        If the images differ in the number of channels, the most frequent number counts. Grey images count as one
        channel if there are no others.
        """
        if not self.decoded:
            return None
        (channels, images), *_ = self.images.most_common()
        mean, square = self.moments[channels] / images
        std = np.sqrt(np.maximum(square - mean**2, 0))
        shown = 1 if set(self.modes) <= {"1", "L", "LA", "I", "I;16", "I;16B"} else channels
        return mean[:shown].tolist(), std[:shown].tolist()

    def duplicates(self) -> list[list[int]]:
        """Returns groups of samples whose images are equal byte for byte."""
        hashes, samples = np.frombuffer(self._hashes, np.uint64), np.frombuffer(self._samples, np.uint64)
        _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
        groups: dict[int, list[int]] = {}
        for number in np.flatnonzero(counts[inverse] > 1).tolist():
            groups.setdefault(int(inverse[number]), []).append(int(samples[number]))
        return sorted(map(sorted, groups.values()))


def _area(header: Kind) -> int:
    return header.height * header.width
