"""ShardIndex: numbers all samples of a list of shards from 0 to n - 1, and locates each in its shard."""

import bisect
import contextlib
import copy
import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from shlex import quote
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

from data.errors import DataError, say
from data.index import index_file
from data.index.index_file import RECORD, IndexFile
from data.index.passed_over import PassedOver
from data.index.samples import FIRST, split_name
from data.index.splits import Paths, find_shards
from data.index.tar import Member
from data.storage.cache import DEFAULT, ShardCache
from data.storage.claim import claim
from data.storage.lru import LRU
from data.storage.protocols import is_remote, split_path
from data.storage.read import read, read_line

Result = TypeVar("Result")
CONNECTIONS = 16
LABEL_FIELDS = {"label", "labels", "class", "class_id", "class_name", "cls", "category", "category_id", "target"}


class ShardIndex:
    """Index of a list of shards. Holds paths and sizes; maps the records of a shard into memory on use, LRU.

    shards       [S] paths and URLs
    sizes        [S] int64, samples in each; sample numbers run through the shards in this order
    bytes        [S] int64, lengths of the shards
    cache        of copies of remote shards
    fingerprint  of the data, the same wherever the shards lie
    digests      [S] uint64, likewise of each shard
    passed_over  what of the shards is not used
    """

    def __init__(self, files: list[IndexFile], cache: ShardCache = DEFAULT):
        self.cache = cache
        self.passed_over = PassedOver()
        if empty := [file.tar for file in files if not file.samples]:
            self.passed_over.add("tars without any file", *empty, count=len(empty))
            files = [file for file in files if file.samples]
            if not files:
                raise DataError(f"{empty[0]} is an archive without any file. Check how it was made.")
        self.shards = [file.tar for file in files]
        self.texts = [file.text for file in files]
        self.sizes = np.array([file.samples for file in files], np.int64)
        self.bytes = np.array([file.tar_bytes for file in files], np.int64)
        self.starts = [file.start for file in files]  # of the records in X.idx.bin
        for file in files:
            if file.notes:
                self.passed_over.update(file.passed_over)
        # A list, because bisect takes a tenth of the time of numpy's search for one sample.
        self.ends: list[int] = np.cumsum(self.sizes).tolist()
        lines = [
            b"%s %d %d %s\n"
            % (os.fsencode(split_path(file.tar)[1]), file.samples, file.tar_bytes, file.probe.hex().encode())
            for file in files
        ]
        self.fingerprint = hashlib.sha256(b"".join(lines)).hexdigest()
        digests = [hashlib.blake2b(line, digest_size=8).digest() for line in lines]
        self.digests = np.frombuffer(b"".join(digests), "<u8")
        self._maps: LRU[str, mmap.mmap] = LRU(_map, mmap.mmap.close, limit=64)

    def __len__(self) -> int:
        return self.ends[-1]

    def locate(self, sample: int) -> tuple[int, int, int]:
        """Returns (number of the shard, offset, size) of a sample's image."""
        shard, (offset, size, _, _) = self._record(sample)
        return shard, offset, size

    def read(self, sample: int) -> bytes:
        """Reads the encoded image of a sample. Raises DataError if it cannot be read."""
        shard, offset, size = self.locate(sample)
        return read(self.shards[shard], offset, size, self.cache)

    def shard_of(self, sample: int) -> int:
        """Returns the number of the shard that holds a sample."""
        return bisect.bisect_right(self.ends, sample)

    def shard_range(self, sample: int) -> tuple[int, int]:
        """Returns (first sample, number of samples) of the shard that holds a sample."""
        shard = self.shard_of(sample)
        return self.ends[shard] - int(self.sizes[shard]), int(self.sizes[shard])

    def label(self, sample: int) -> int:
        """Returns the class in the sample's .cls member, -1 if there is none."""
        return self._record(sample)[1][3]

    def explain_label(self, sample: int) -> str:
        """Says why a sample has no label: what its .cls holds, or which field of its .json may be one."""
        tar = self.shards[self.shard_of(sample)]
        members = {split_name(member.name)[1].lower(): member for member in self.members(sample)}
        if label := members.get("cls"):
            text = read(tar, label.offset, min(label.size, 40), self.cache).decode("utf-8", "backslashreplace")
            return f"{label.name} holds {text!r}, which is no number"
        if other := next((member for end, member in members.items() if end.endswith(".cls")), None):
            return f"{other.name} is no .cls of the key {split_name(other.name)[0]!r}, which ends at the first dot"
        record = members.get("json")
        if record and record.size < 1 << 20:
            with contextlib.suppress(ValueError):
                fields = json.loads(read(tar, record.offset, record.size, self.cache))
                for field in LABEL_FIELDS & fields.keys() if isinstance(fields, dict) else ():
                    return f"{record.name} has the field {field}={fields[field]!r}, and labels are read from .cls alone"
        return "no .cls in the shards"

    @property
    def labels(self) -> np.ndarray:
        """Classes of all samples, [samples] int64, -1 if unknown."""
        return np.concatenate([self.table(shard)[:, 3] for shard in range(len(self.shards))])

    def key(self, sample: int) -> str:
        """Returns the name that the members of a sample have in common, with its folder."""
        shard, (offset, _, line, _) = self._record(sample)
        key = index_file.parse_key(read_line(self.texts[shard], line), offset)
        return key if key is not None else split_name(self.members(sample)[0].name)[0]

    def members(self, sample: int) -> list[Member]:
        """Returns the members of a sample, its image included, in the order of the tar."""
        shard, (offset, _, line, _) = self._record(sample)
        members = list(index_file.parse_members(read_line(self.texts[shard], line)))
        if all(member.offset != offset for member in members):
            raise DataError(
                f"{self.texts[shard]} was changed after {self.shards[shard]} was indexed. "
                f"Run `python -m data.index {self.shards[shard]}`."
            )
        return members

    def table(self, shard: int) -> np.ndarray:
        """Returns the records of a shard, [samples, 4] int64: offset, size, start of the line in X.idx, label or -1."""
        values, start = 4 * int(self.sizes[shard]), self.starts[shard]
        return np.frombuffer(self._maps[f"{self.texts[shard]}.bin"], "<i8", values, start).reshape(-1, 4).copy()

    def without_downloads(self) -> "ShardIndex":
        """Returns the same index for reading a few images, without downloading whole shards."""
        index = copy.copy(self)
        index.cache = replace(self.cache, fill=False)
        return index

    def _record(self, sample: int) -> tuple[int, tuple[int, int, int, int]]:
        shard = self.shard_of(sample)
        first = self.ends[shard] - int(self.sizes[shard])
        records = self._maps[f"{self.texts[shard]}.bin"]
        return shard, RECORD.unpack_from(records, self.starts[shard] + (int(sample) - first) * RECORD.size)


def open_shards(
    paths: Paths,
    split: str | None = None,
    cache: ShardCache = DEFAULT,
    image: str | None = None,
    maps: Iterable[str] = (),
) -> ShardIndex:
    """Opens the shards that `splits.find_shards` finds, and indexes those without an index.

    image  extension of the member that is the image of its sample; None: samples have one each; see index_file.choose
    maps   extensions of the members that are maps of the image

    Raises DataError if there are none, splits are mixed, a sample has several images and none is chosen, or a shard is
    damaged, compressed, not a tar or has no image. Shards without any file are passed over.
    """
    return index_tars(find_shards(paths, split), cache, image, maps)


def index_tars(
    tars: list[str], cache: ShardCache = DEFAULT, image: str | None = None, maps: Iterable[str] = ()
) -> ShardIndex:
    """Does what `open_shards` does, for exactly these tars."""
    declared = frozenset(maps)
    chosen = image not in (None, FIRST) or bool(declared)
    files = dict(zip(tars, _each(lambda tar: index_file.load(tar, cache, chosen), tars), strict=True))
    if lacking := [tar for tar, file in files.items() if file is None]:
        files |= build_indexes(lacking, cache, anew=False)
    for tar, file in files.items():
        if file and is_remote(tar):
            cache.forget_other_states(tar, file.stamp)
    return ShardIndex([index_file.choose(file, image, declared) for file in files.values() if file], cache)


def build_indexes(shards: list[str], cache: ShardCache = DEFAULT, anew: bool = True) -> dict[str, IndexFile]:
    """Indexes shards; returns the index of each.

    Ranks share the work: each begins at another shard, and waits for one that another process is indexing.

    anew  False: an index that has appeared meanwhile is taken, and one of an earlier version converted
    """
    from data.index import build, version_1  # which a run needs once, if ever

    def build_one(shard: str) -> IndexFile:
        try:
            with claim(index_file.writable_path(shard)):
                found = None if anew else index_file.load(shard, cache, notes=True) or version_1.load(shard, cache)
                return found or build.build(shard, cache)
        except OSError as error:
            raise DataError(
                f"{shard} cannot be indexed ({error}). Check the permissions and the free space; "
                "MAE_CACHE names the folder for indexes of shards that lie where nothing may be written."
            ) from None

    first = _first_shard(len(shards))
    shards_from_here = shards[first:] + shards[:first]
    built = with_progress(_each(build_one, shards_from_here), "indexing", len(shards))
    files = dict(zip(shards_from_here, built, strict=True))
    _say_elsewhere(list(files.values()))
    return {shard: files[shard] for shard in shards}


def _first_shard(number: int) -> int:
    """Returns the shard, of so many, with which this rank begins: 0 on rank 0, whose errors are printed."""
    for rank, ranks in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        with contextlib.suppress(LookupError, ValueError, ZeroDivisionError):
            return number * int(os.environ[rank]) // int(os.environ[ranks]) % number
    return 0


def _say_elsewhere(files: list[IndexFile]) -> None:
    """Says of which folders the indexes lie in the cache, since nothing may be written there."""
    folders = {os.path.dirname(file.tar): os.path.dirname(file.text) for file in files if not is_remote(file.tar)}
    for folder, cached in folders.items():
        if os.path.abspath(folder) != cached:
            say(
                f"the indexes of {folder or '.'} are in {cached}, for the shards lie where nothing may be written. "
                f"Whoever may run `python -m data.index {quote(folder or '.')}` puts them there once, for all machines."
            )


def _each(function: Callable[[str], Result], shards: list[str]) -> Iterator[Result]:
    """Applies a function to each shard; to several remote ones at a time, since it mostly waits for the server."""
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
