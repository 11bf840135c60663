"""The index of one tar, in two files beside it.

X.idx       NVIDIA DALI's `wds2idx` text, v1.2: a line `v1.2 SAMPLES`, then for each sample one line of
            `EXTENSION OFFSET SIZE NAME` for each of its members. For exchange, and for the keys.
X.idx.bin   for mapping into memory: a header, then for each sample that has an image a record of
            (offset and size of the image in the tar, start of the sample's line in X.idx, label or -1)

Where the tar's folder cannot be written they lie in a cache folder instead: $MAE_CACHE or ~/.cache/mae-index.
"""

import hashlib
import itertools
import os
import re
import struct
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.errors import DataError
from data.tar import BLOCK, Member, members

IMAGES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm")
HEADER = struct.Struct("<8sQqQ8s")  # magic, bytes of the tar, its mtime in ns, records, probe
RECORD = struct.Struct("<QQQq")
MAGIC = b"maeidx01"
PROBES = 8


class IndexFile(NamedTuple):
    """What the header says about one tar."""

    tar: str
    text: str  # path of X.idx; X.idx.bin lies beside it
    samples: int
    tar_bytes: int
    probe: bytes  # a hash over some headers of the tar: tells it from another tar of the same length


def split_name(name: str) -> tuple[str, str]:
    """(key, extension) by webdataset's rule: the key ends before the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension


def load(tar: str) -> IndexFile | None:
    """The header of a tar's index; None when there is none, or when it belongs to another state of the tar."""
    state = os.stat(tar)
    for text in _places(tar):
        try:
            file = os.open(f"{text}.bin", os.O_RDONLY)
        except OSError:
            continue
        try:
            header, length = os.read(file, HEADER.size), os.fstat(file).st_size
            if len(header) < HEADER.size:
                continue
            magic, tar_bytes, mtime, samples, probe = HEADER.unpack(header)
            if (magic, tar_bytes, length) != (MAGIC, state.st_size, HEADER.size + samples * RECORD.size):
                continue
            # A copy of both files has another time stamp, another tar has other headers.
            if mtime != state.st_mtime_ns and probe != _probe(tar, _offsets(os.pread(file, length, 0))):
                continue
            return IndexFile(tar, text, samples, tar_bytes, probe)
        finally:
            os.close(file)
    return None


def build(tar: str) -> IndexFile:
    """Reads the headers of a tar and writes its index. DataError: damaged, truncated, no tar, or without an image."""
    state = os.stat(tar)
    lines, records = [], []
    samples = [list(group) for _, group in itertools.groupby(_named(tar), key=lambda m: split_name(m.name)[0])]
    position = len(f"v1.2 {len(samples)}\n")
    with open(tar, "rb") as file:
        for sample in samples:
            lines.append(" ".join(f"{split_name(m.name)[1]} {m.offset} {m.size} {m.name}" for m in sample) + "\n")
            extensions = _extensions(tar, sample)
            if image := _image(extensions):
                records.append((image.offset, image.size, position, _label(file, extensions.get("cls"))))
            position += len(lines[-1].encode("utf-8", "surrogateescape"))
    if not records:
        raise DataError(
            f"{tar} holds no image: none of its {sum(map(len, samples))} files ends in "
            f"{', '.join('.' + extension for extension in IMAGES)}. Check that it is a shard of images."
        )
    text = f"v1.2 {len(samples)}\n" + "".join(lines)
    probe = _probe(tar, np.array([record[0] for record in records]))
    header = HEADER.pack(MAGIC, state.st_size, state.st_mtime_ns, len(records), probe)
    body = np.array(records, dtype=[("offset", "<u8"), ("size", "<u8"), ("line", "<u8"), ("label", "<i8")]).tobytes()
    path = _write(tar, text.encode("utf-8", "surrogateescape"), header + body)
    return IndexFile(tar, path, len(records), state.st_size, probe)


def listed(line: str) -> Iterator[Member]:
    """The members of the sample on a line of X.idx.

    Names may hold spaces; that the extension is the end of the name tells where a name ends.
    """
    for found in re.finditer(r"(\S.*?) (\d+) (\d+) ((?:\S.*?/)?[^./]+\.\1)(?= |$)", line):
        yield Member(found[4], int(found[2]), int(found[3]))


def _named(tar: str) -> Iterable[Member]:
    """Members that belong to a sample: hidden files and files without an extension do not."""
    for member in members(tar):
        key, extension = split_name(member.name)
        if "\n" in member.name:
            raise DataError(
                f"{tar} has a line break in the member name {member.name!r}, which no index can hold. Rename it."
            )
        if extension and key and not key.endswith("/"):
            yield member


def _extensions(tar: str, sample: list[Member]) -> dict[str, Member]:
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


def _image(extensions: dict[str, Member]) -> Member | None:
    """The image of a sample: the member called .jpg, .png, …, or else the first that ends so, such as .large.jpg."""
    exact = [member for extension, member in extensions.items() if extension in IMAGES]
    ending = [member for extension, member in extensions.items() if extension.rpartition(".")[2] in IMAGES]
    return next(iter(exact + ending), None)


def _label(file, member: Member | None) -> int:
    if member is None:
        return -1
    text = os.pread(file.fileno(), min(member.size, 20), member.offset).strip()
    return int(text) if re.fullmatch(rb"\d{1,18}", text) else -1


def _offsets(contents: bytes) -> np.ndarray:
    return np.frombuffer(contents, "<u8", offset=HEADER.size)[:: RECORD.size // 8]


def _probe(tar: str, offsets: np.ndarray) -> bytes:
    """A hash over the tar's own headers of a few images."""
    digest = hashlib.blake2b(digest_size=8)
    with open(tar, "rb", buffering=0) as file:
        for i in np.linspace(0, len(offsets) - 1, PROBES).astype(int):
            digest.update(os.pread(file.fileno(), BLOCK, int(offsets[i]) - BLOCK))
    return digest.digest()


def _places(tar: str) -> tuple[str, str]:
    """Where X.idx may lie: beside the tar, else in the cache folder under a hash of the tar's folder."""
    folder, base = os.path.split(os.path.abspath(tar))
    name = base.removesuffix(".tar") + ".idx"
    root = os.environ.get("MAE_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "mae-index")
    return os.path.join(folder, name), os.path.join(root, hashlib.sha256(folder.encode()).hexdigest()[:16], name)


def _write(tar: str, text: bytes, binary: bytes) -> str:
    """Both files, whole or not at all; the path of the text."""
    beside, cached = _places(tar)
    if _writable(Path(beside).parent):
        path = beside
    else:
        path = cached
        os.makedirs(os.path.dirname(path), exist_ok=True)
    for target, contents in ((path, text), (f"{path}.bin", binary)):
        temporary = f"{target}.{uuid.uuid4().hex}.tmp"  # Ranks on several hosts may write it at the same time.
        Path(temporary).write_bytes(contents)
        os.replace(temporary, target)
    return path


def _writable(folder: Path) -> bool:
    # The superuser may write anywhere, but a folder without any write permission is meant to stay as it is.
    return os.access(folder, os.W_OK) and bool(folder.stat().st_mode & 0o222)
