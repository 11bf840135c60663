"""Near-duplicates: images that look alike, whatever their size, format and compression.

1 hash   64 bits of each image: the signs of its lowest frequencies (pHash, Zauner 2010)     perceptual_hash
2 pair   hashes that differ in at most 3 bits: they agree in one of four bands of 16         close_pairs
3 group  connected components of the pairs; the largest image of each is kept                group_duplicates
4 table  the group of each sample, for data.rule.unique                                      write_groups
"""

import itertools
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data.errors import DataError
from data.images.arrays import channels_of
from data.images.decode import has_16_bits, image_size, verify
from data.images.pil import picture
from data.index.index import ShardIndex
from data.index.sample_table import UNREADABLE, SampleTable, new_rows, write_rows
from data.inspect.survey import CHUNK, Target, chunks
from data.parallel import run
from data.storage.read import read

SIDE, LOW = 32, 8  # pixels of the reduced image, and frequencies of it that are hashed, in each direction
FLAT = 2.0  # deviation of the brightness, of 255, below which an image is compared with no other: its hash is noise
MOST_BITS, BANDS = 3, 4  # more bands than bits: two hashes that differ in so few agree in at least one band


class Look(NamedTuple):
    """What is compared of one sample."""

    sample: int
    hash: int
    flat: bool  # compared with no other
    height: int  # of the upright image; 0 if it could not be read
    width: int


def find_duplicates(index: ShardIndex, jobs: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Reads all samples and groups those that look alike.

    returns  groups [samples] int64: the sample that is kept of each one's group, itself if it is alone, UNREADABLE;
             sizes [samples] int64: pixels of the shorter side, 0 if it could not be read
    """
    count = len(index)
    hashes, areas, sizes = np.zeros(count, np.uint64), np.zeros(count, np.int64), np.zeros(count, np.int64)
    compared = np.zeros(count, bool)
    targets = chunks(index, np.arange(count), np.zeros(0, np.int64))
    with run(look_at, targets, max(1, min(jobs, count // CHUNK)), "hashing", count) as (answers, _):
        for sample, hashed, flat, height, width in itertools.chain.from_iterable(answers):
            hashes[sample], areas[sample], sizes[sample] = hashed, height * width, min(height, width)
            compared[sample] = height and not flat
    groups = np.arange(count)
    groups[compared] = np.flatnonzero(compared)[group_duplicates(hashes[compared], areas[compared])]
    groups[sizes == 0] = UNREADABLE
    return groups, sizes


def look_at(targets: list[Target], advance: Callable[[], None]) -> list[Look]:
    """Reads and hashes the samples. Calls `advance` after each."""
    looks = []
    for sample, tar, offset, size, _ in targets:
        looks.append(_look(sample, partial(read, tar, offset, size)))
        advance()
    return looks


def _look(sample: int, read_image: Callable[[], bytes]) -> Look:
    try:
        data = read_image()
        height, width = image_size(data)
        reduced = reduce(data)
    except DataError:
        return Look(sample, 0, True, 0, 0)
    return Look(sample, perceptual_hash(reduced), bool(reduced.std() < FLAT), height, width)


def reduce(data: bytes) -> np.ndarray:
    """Decodes an image upright, in grey, and reduces it: [SIDE, SIDE] uint8. Raises DataError if it is damaged."""
    if channels_of(data) or has_16_bits(data):
        values = verify(data)
        mean = Image.fromarray(values.mean(axis=2).astype(np.uint8))
        grey = Image.fromarray(values).convert("L") if values.shape[2] == 3 else mean
    else:
        grey = picture(data, "L", at_least=(4 * SIDE, 4 * SIDE))
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def perceptual_hash(grey: np.ndarray) -> int:
    """Hashes an image of SIDE pixels to 64 bits: which of its lowest frequencies (DCT-II) are above their median.

    Changes of size, compression, brightness and contrast change few bits; mirroring and cropping change many.
    """
    basis = _cosines()
    low = basis @ grey.astype(np.float64) @ basis.T
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes())


@cache
def _cosines() -> np.ndarray:
    """Returns the LOW lowest rows of the DCT-II, [LOW, SIDE]."""
    return np.cos(np.pi * np.arange(LOW)[:, None] * (2 * np.arange(SIDE) + 1) / (2 * SIDE))


def group_duplicates(hashes: np.ndarray, areas: np.ndarray) -> np.ndarray:
    """Returns for each image which one of its group is kept: the largest, of equal ones the first.

    hashes   [n]  uint64
    areas    [n]  pixels
    returns  [n]  int64, numbers of images

    Groups are connected components: two images of a group may differ in more bits, if others lie between them.
    """
    different, which = np.unique(hashes, return_inverse=True)
    one, other = close_pairs(different)
    pairs = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(different),) * 2)
    component = connected_components(pairs, directed=False)[1][which]
    largest_last = np.lexsort((-np.arange(len(hashes)), areas))
    kept = np.zeros(len(hashes), np.int64)
    kept[component[largest_last]] = largest_last  # of several that are assigned to one place the last stays
    return kept[component]


def close_pairs(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns all pairs of different hashes [n] uint64 that differ in at most MOST_BITS bits: numbers [p], [p].

    A pair that agrees in several bands comes several times.
    """
    found: list[tuple[np.ndarray, np.ndarray]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    width = 64 // BANDS
    for band in range(BANDS):
        values = (hashes >> np.uint64(band * width)) & np.uint64((1 << width) - 1)
        order = np.argsort(values, kind="stable")
        ends = np.searchsorted(values[order], values[order], side="right")  # of the hashes with the same band
        rows, ahead = np.arange(len(hashes)), 0
        while len(rows):
            ahead += 1
            rows = rows[rows + ahead < ends[rows]]
            one, other = order[rows], order[rows + ahead]
            close = np.bitwise_count(hashes[one] ^ hashes[other]) <= MOST_BITS
            found.append((one[close], other[close]))
    one, other = (np.concatenate(column) for column in zip(*found, strict=True))
    return one, other


def list_groups(groups: np.ndarray) -> list[list[int]]:
    """Returns the groups of several samples, the one that is kept first."""
    alone = np.arange(len(groups))
    members: dict[int, list[int]] = {}
    for sample in np.flatnonzero((groups != alone) & (groups >= 0)).tolist():
        members.setdefault(int(groups[sample]), [int(groups[sample])]).append(sample)
    return [members[kept] for kept in sorted(members)]


def write_groups(path: Path, index: ShardIndex, groups: np.ndarray, sizes: np.ndarray) -> None:
    """Writes groups into a table, and sizes if it has none; all else stays. Makes it if it is not there.

    Raises DataError if the table there is one of other shards.
    """
    if os.path.exists(path):
        table = SampleTable(path, index)
        rows, starts = np.array(table.rows), np.array(table.starts)
    else:
        rows, starts = new_rows(index, np.arange(len(index))), np.cumsum(index.sizes) - index.sizes
    row_of = np.concatenate([start + np.arange(size) for start, size in zip(starts, index.sizes, strict=True)])
    if not rows["size"][row_of].any():  # else they are of the time at which the losses were measured
        rows["size"][row_of] = sizes
    rows["group"][row_of] = np.where(groups >= 0, row_of[groups.clip(0)], groups)
    write_rows(path, rows)


def near_duplicates(index: ShardIndex, jobs: int, table: Path | None) -> dict[str, Any]:
    """Finds near-duplicates and writes them to the table, if one is wanted. Returns what the report says of them."""
    if table is not None and os.path.exists(table):
        SampleTable(table, index)  # refuses one of other shards before all images are read
    groups, sizes = find_duplicates(index, jobs)
    if table is not None:
        write_groups(table, index, groups, sizes)
    places = [
        [{"shard": index.shards[index.shard_of(sample)], "key": index.key(sample)} for sample in group]
        for group in list_groups(groups)
    ]
    return {"near_duplicates": places, "different": int((groups == np.arange(len(groups))).sum())}
