"""Index of one tar, in two files beside it.

X.idx       NVIDIA DALI's `wds2idx` text, v1.2: a line `v1.2 SAMPLES`, then for each sample one line of
            `EXTENSION OFFSET SIZE NAME` for each of its members. For other programs, and for the keys.
X.idx.bin   to be mapped into memory: a header, then a record for each sample that has an image: offset and size of
            the image in the tar, start of the sample's line in X.idx, label or -1

If the tar's folder is remote or not writable, both lie in a cache folder: $MAE_CACHE or ~/.cache/mae-index.
"""

import contextlib
import hashlib
import itertools
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from data.atomic import replace_file
from data.errors import DataError
from data.index.tar import BLOCK, Member, TarBytes, open_local, open_remote, size_and_stamp, walk
from data.storage import remote
from data.storage.cache import DEFAULT, ShardCache, cache_root
from data.storage.protocols import Missing, is_remote, split_path

Content = TypeVar("Content")
IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "npy")
HEADER = struct.Struct("<8sQqQ8s")  # magic, bytes of the tar, its stamp (see data/index/tar.py), records, probe
RECORD = struct.Struct("<QQQq")
MAGIC = b"maeidx01"
PROBES = 8  # tar headers that tell a tar from another one of the same length


class IndexFile(NamedTuple):
    """Header of X.idx.bin, and where it lies."""

    tar: str
    text: str  # path of X.idx; X.idx.bin lies beside it
    samples: int
    tar_bytes: int
    stamp: int  # of the state of the tar, see data/index/tar.py
    probe: bytes  # hash of PROBES headers of the tar


def split_name(name: str) -> tuple[str, str]:
    """Splits a name into (key, extension) by webdataset's rule: the key ends before the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def load(tar: str, cache: ShardCache = DEFAULT) -> IndexFile | None:
    """Returns a tar's index; None if there is none, or only that of another state of the tar."""
    size, stamp = size_and_stamp(tar, cache)
    for text in _index_paths(tar):
        with contextlib.suppress(OSError), open(f"{text}.bin", "rb", buffering=0) as file:
            header, length = file.read(HEADER.size), os.fstat(file.fileno()).st_size
            if not _is_complete(header, length, size):
                continue
            _, _, indexed, samples, probe = HEADER.unpack(header)
            # A copy of tar and index has another time stamp, but still the same headers.
            if indexed != stamp and (is_remote(tar) or probe != _probe_of(tar, header + file.read())):
                continue
            return IndexFile(tar, text, samples, size, stamp, probe)
    return None


def build(tar: str, cache: ShardCache = DEFAULT) -> IndexFile:
    """Reads the headers of a tar and writes its index. Raises DataError if it is damaged, not a tar, or has no image.

    Of a remote tar the first of these that is possible: copies the index beside it; downloads its headers by range
    requests; downloads it into the cache.
    """
    if not is_remote(tar):
        with open_local(tar) as opened:
            return _build(opened)
    if copied := _copy_remote_index(tar, cache):
        return copied
    try:
        return _build(open_remote(tar, cache))
    except remote.NoRanges:
        _, stamp = size_and_stamp(tar, cache)
        cache.forget_other_states(tar, stamp)
        with open_local(tar, cache.fetch(tar), stamp) as opened:
            return _build(opened)


def _build(tar: TarBytes) -> IndexFile:
    lines, records = [], []
    samples = [list(group) for _, group in itertools.groupby(_labelled(tar), key=lambda m: split_name(m[0].name)[0])]
    position = len(f"v1.2 {len(samples)}\n")
    for sample in samples:
        lines.append(" ".join(f"{split_name(m.name)[1]} {m.offset} {m.size} {m.name}" for m, _ in sample) + "\n")
        extensions = _by_extension(tar.path, [member for member, _ in sample])
        if image := find_image(extensions):
            label = next((label for member, label in sample if member is extensions.get("cls")), -1)
            records.append((image.offset, image.size, position, label))
        position += len(lines[-1].encode("utf-8", "surrogateescape"))
    if not records:
        raise DataError(
            f"{tar.path} holds no image: none of its {sum(map(len, samples))} files ends in "
            f"{', '.join('.' + extension for extension in IMAGES)}. Check that it is a shard of images."
        )
    text = f"v1.2 {len(samples)}\n" + "".join(lines)
    probe = _probe(tar, np.array([record[0] for record in records]))
    header = HEADER.pack(MAGIC, tar.size, tar.stamp, len(records), probe)
    body = np.array(records, dtype=[("offset", "<u8"), ("size", "<u8"), ("line", "<u8"), ("label", "<i8")]).tobytes()
    path = _write(tar.path, text.encode("utf-8", "surrogateescape"), header + body)
    return IndexFile(tar.path, path, len(records), tar.size, tar.stamp, probe)


def _copy_remote_index(tar: str, cache: ShardCache) -> IndexFile | None:
    """Copies the index that lies beside a remote tar; returns None if there is none, or its tar has another length."""
    folder, name = split_path(tar)
    beside = f"{folder}/{name.removesuffix('.tar')}.idx"
    try:
        binary, text = (remote.contents(url, cache.retry) for url in (f"{beside}.bin", beside))
    except Missing:
        return None
    size, stamp = size_and_stamp(tar, cache)
    if not _is_complete(binary, len(binary), size):
        return None
    magic, _, _, samples, probe = HEADER.unpack_from(binary)
    path = _write(tar, text, HEADER.pack(magic, size, stamp, samples, probe) + binary[HEADER.size :])
    return IndexFile(tar, path, samples, size, stamp, probe)


def _is_complete(header: bytes, length: int, tar_bytes: int) -> bool:
    """Returns whether X.idx.bin, of this length, is complete and belongs to a tar of `tar_bytes`."""
    if len(header) < HEADER.size:
        return False
    magic, described, _, samples, _ = HEADER.unpack_from(header)
    return (magic, described, length) == (MAGIC, tar_bytes, HEADER.size + samples * RECORD.size)


def parse_key(line: str, offset: int) -> str | None:
    """Returns the key of the sample on a line of X.idx, by its member at `offset`; None if that takes `parse_members`.

    Called for every sample of every batch; takes a tenth of the time of `parse_members`.
    """
    before, _, after = line.partition(f" {offset} ")
    end = f".{before.rpartition(' ')[2]}"
    name = after.partition(" ")[2]
    return name.partition(end)[0] if name.count(end) == 1 and (name.endswith(end) or f"{end} " in name) else None


def parse_members(line: str) -> Iterator[Member]:
    """Yields the members of the sample on a line of X.idx.

    Names may contain spaces; a name ends where it ends in its extension.
    """
    for found in re.finditer(r"(\S.*?) (\d+) (\d+) ((?:\S.*?/)?[^./]+\.\1)(?= |$)", line):
        yield Member(found[4], int(found[2]), int(found[3]))


def _labelled(tar: TarBytes) -> Iterable[tuple[Member, int]]:
    """Yields the members that belong to samples, with label or -1; skips hidden files and those without extension."""
    for member in walk(tar):
        key, extension = split_name(member.name)
        if "\n" in member.name:
            raise DataError(
                f"{tar.path} has a line break in the member name {member.name!r}, which no index can hold. Rename it."
            )
        if extension and key and not key.endswith("/"):
            is_label = extension.lower() == "cls"
            yield member, parse_label(tar.pread(min(member.size, 20), member.offset)) if is_label else -1


def _by_extension(tar: str, sample: list[Member]) -> dict[str, Member]:
    found: dict[str, Member] = {}
    for member in sample:
        extension = split_name(member.name)[1].lower()
        if extension in found:
            raise DataError(
                f"{tar} has two members with the key {split_name(member.name)[0]!r} and the extension {extension!r}: "
                f"{found[extension].name!r} and {member.name!r}. A key must not contain dots and belongs to one sample."
            )
        found[extension] = member
    return found


def find_image(extensions: Mapping[str, Content]) -> Content | None:
    """Returns the image of a sample: the member called .jpg, .png, …, else the first ending so, such as .large.jpg."""
    exact = [content for extension, content in extensions.items() if extension in IMAGES]
    ending = [content for extension, content in extensions.items() if extension.rpartition(".")[2] in IMAGES]
    return next(iter(exact + ending), None)


def parse_label(text: bytes) -> int:
    """Returns the number in a .cls member, -1 if it is something else."""
    return int(text) if re.fullmatch(rb"\s*\d{1,18}\s*", text) else -1


def _probe_of(tar: str, binary: bytes) -> bytes:
    """Returns the probe of a local tar, at the offsets in X.idx.bin."""
    with open_local(tar) as opened:
        return _probe(opened, np.frombuffer(binary, "<u8", offset=HEADER.size)[:: RECORD.size // 8])


def _probe(tar: TarBytes, offsets: np.ndarray) -> bytes:
    """Hashes the tar headers of PROBES images, evenly spaced."""
    digest = hashlib.blake2b(digest_size=8)
    for i in np.linspace(0, len(offsets) - 1, PROBES).astype(int):
        digest.update(tar.pread(BLOCK, int(offsets[i]) - BLOCK))
    return digest.digest()


def _index_paths(tar: str) -> list[str]:
    """Returns the possible paths of X.idx: beside a local tar; in the cache folder, by a hash of the tar's folder."""
    folder, base = split_path(tar if is_remote(tar) else os.path.abspath(tar))
    name = base.removesuffix(".tar") + ".idx"
    cached = os.path.join(cache_root(), hashlib.sha256(folder.encode()).hexdigest()[:16], name)
    return [cached] if is_remote(tar) else [os.path.join(folder, name), cached]


def _write(tar: str, text: bytes, binary: bytes) -> str:
    """Writes both files and returns the path of X.idx."""
    path, *elsewhere = _index_paths(tar)
    folder = Path(path).parent
    # The superuser may write anywhere, but a folder without any write permission should stay as it is.
    if elsewhere and not (os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222):
        path = elsewhere[0]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    for target, contents in ((path, text), (f"{path}.bin", binary)):
        with replace_file(target) as file:
            file.write(contents)
    return path
