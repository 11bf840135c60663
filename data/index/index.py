"""ShardIndex: all samples of a list of shards as numbers 0 … n - 1, and where each of them lies."""

import bisect
import copy
import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from data.errors import DataError
from data.index import index_file
from data.index.index_file import HEADER, RECORD, IndexFile
from data.index.splits import Paths, find_shards
from data.index.tar import Member
from data.storage.cache import DEFAULT, ShardCache
from data.storage.lru import LRU
from data.storage.protocols import is_remote, split_path
from data.storage.read import read_line

Result = TypeVar("Result")
CONNECTIONS = 16


class ShardIndex:
    """Where each sample lies in a list of shards.

    shards  [S] paths and URLs; sizes [S] int64, samples in each; samples are numbered through the shards in this order
    bytes   [S] lengths of the shards
    cache   where copies of remote shards lie

    Holds paths and sizes alone; the records of a shard are mapped when one is asked for, a bounded number at a time.
    """

    def __init__(self, files: list[IndexFile], cache: ShardCache = DEFAULT):
        self.cache = cache
        self.shards = [file.tar for file in files]
        self.texts = [file.text for file in files]
        self.sizes = np.array([file.samples for file in files], np.int64)
        self.bytes = np.array([file.tar_bytes for file in files], np.int64)
        # A list, since each sample is searched for: numpy takes ten times as long.
        self.ends: list[int] = np.cumsum(self.sizes).tolist()
        digest = hashlib.sha256()
        for file in files:
            name = os.fsencode(split_path(file.tar)[1])
            digest.update(b"%s %d %d %s\n" % (name, file.samples, file.tar_bytes, file.probe.hex().encode()))
        self.fingerprint = digest.hexdigest()  # The same wherever the shards lie.
        self._maps: LRU[str, mmap.mmap] = LRU(_map, mmap.mmap.close, limit=64)

    def __len__(self) -> int:
        return self.ends[-1]

    def locate(self, sample: int) -> tuple[int, int, int]:
        """(number of the shard, offset, size) of the image of a sample."""
        shard, (offset, size, _, _) = self._record(sample)
        return shard, offset, size

    def shard_of(self, sample: int) -> int:
        """The number of the shard that holds a sample."""
        return bisect.bisect_right(self.ends, sample)

    def shard_range(self, sample: int) -> tuple[int, int]:
        """(number of the first sample, samples) of the shard that holds a sample."""
        shard = self.shard_of(sample)
        return self.ends[shard] - int(self.sizes[shard]), int(self.sizes[shard])

    def label(self, sample: int) -> int:
        """The class that the sample's .cls member names, -1 if there is none."""
        return self._record(sample)[1][3]

    @property
    def labels(self) -> np.ndarray:
        """[samples] int64: the classes of all samples, -1 where unknown."""
        return np.concatenate([self.table(shard)[:, 3] for shard in range(len(self.shards))])

    def key(self, sample: int) -> str:
        """The name that the members of a sample have in common, with its folder."""
        shard, (offset, _, line, _) = self._record(sample)
        key = index_file.key_in(read_line(self.texts[shard], line), offset)
        return key if key is not None else index_file.split_name(self.members(sample)[0].name)[0]

    def members(self, sample: int) -> list[Member]:
        """The files of a sample in the order of the tar, its image among them."""
        shard, (offset, _, line, _) = self._record(sample)
        members = list(index_file.listed(read_line(self.texts[shard], line)))
        if all(member.offset != offset for member in members):
            raise DataError(
                f"{self.texts[shard]} was changed after {self.shards[shard]} was indexed. "
                f"Run `python -m data.index {self.shards[shard]}`."
            )
        return members

    def table(self, shard: int) -> np.ndarray:
        """[samples of the shard, 4] int64: offset and size of the image, start of its line in X.idx, label or -1."""
        return np.frombuffer(self._maps[f"{self.texts[shard]}.bin"], "<i8", offset=HEADER.size).reshape(-1, 4).copy()

    def sparing(self) -> "ShardIndex":
        """The same index for reading a few images: without downloading the whole shards that they are in."""
        index = copy.copy(self)
        index.cache = replace(self.cache, fill=False)
        return index

    def _record(self, sample: int) -> tuple[int, tuple[int, int, int, int]]:
        shard = self.shard_of(sample)
        first = self.ends[shard] - int(self.sizes[shard])
        records = self._maps[f"{self.texts[shard]}.bin"]
        return shard, RECORD.unpack_from(records, HEADER.size + (int(sample) - first) * RECORD.size)


def open_shards(paths: Paths, split: str | None = None, cache: ShardCache = DEFAULT) -> ShardIndex:
    """The index of the shards that a path means (see `splits.find_shards`); shards without one are indexed first.

    DataError: no such shards, two splits mixed, a shard that is truncated, compressed, not a tar or without an image.
    """
    return index_tars(find_shards(paths, split), cache)


def index_tars(tars: list[str], cache: ShardCache = DEFAULT) -> ShardIndex:
    """As `open_shards`, of exactly these tars."""
    files = dict(zip(tars, _each(lambda tar: index_file.load(tar, cache), tars), strict=True))
    build_indexes([tar for tar, file in files.items() if file is None], files, cache)
    for tar, file in files.items():
        if file and is_remote(tar):
            cache.forget_other_states(tar, file.stamp)
    return ShardIndex([file for file in files.values() if file], cache)


def build_indexes(shards: list[str], files: dict[str, IndexFile | None], cache: ShardCache = DEFAULT) -> None:
    # Every rank may come here at once: each writes the same files and renames them into place.
    def build(shard: str) -> IndexFile:
        try:
            return index_file.build(shard, cache)
        except OSError as error:
            raise DataError(
                f"{shard} cannot be indexed ({error}). Check the permissions and the free space; "
                "MAE_CACHE names the folder for indexes of shards that lie where nothing may be written."
            ) from None

    built = with_progress(_each(build, shards), "indexing", len(shards))
    files.update(zip(shards, built, strict=True))


def _each(function: Callable[[str], Result], shards: list[str]) -> Iterator[Result]:
    """The function of each shard; of remote shards several at a time, as it spends its time waiting for a server."""
    if not any(map(is_remote, shards)):
        yield from map(function, shards)
        return
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        yield from pool.map(function, shards)


def with_progress(items: Iterable[Result], what: str, number: int) -> Iterable[Result]:
    what = f"{what} {number} shards"
    return track(items, what, total=number, console=Console(stderr=True), disable=not number)


def _map(path: str) -> mmap.mmap:
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"the index {path} cannot be opened: {error.strerror}. Was it removed while in use?") from None
