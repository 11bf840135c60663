"""Index of one tar, in two files beside it.

X.idx       NVIDIA DALI's `wds2idx` text, v1.2: a line `v1.2 SAMPLES`, then for each sample one line of
            `EXTENSION OFFSET SIZE NAME` for each of its members. For other programs, and for the keys.
X.idx.bin   to be mapped into memory: a header, notes (JSON), then tables of records: offset and size of an image in the
            tar, start of its sample's line in X.idx, label or -1. The first table has the image of each sample, others
            all images of one extension where samples have several: which table is read is chosen at opening

If the tar's folder is remote or not writable, both lie in a cache folder: $MAE_CACHE or ~/.cache/mae-index.
Indexes of version 1, without notes and further tables, are converted: data/index/version_1.py.
"""

import contextlib
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.atomic import replace_file
from data.errors import DataError
from data.index.passed_over import BESIDE, PassedOver
from data.index.samples import FIRST, IMAGES, say_choice, split_name
from data.index.tar import Member, size_and_stamp
from data.storage.cache import DEFAULT, ShardCache, cache_root
from data.storage.protocols import is_remote, split_path

# Magic, bytes of the tar, its stamp (data/index/tar.py), records of the first table, probe; records of all tables,
# bytes of the notes, and 1 if they hold something to be said even if no image is chosen.
HEADER = struct.Struct("<8sQqQ8sQQQ")
MAGIC = b"maeidx02"
RECORD = struct.Struct("<QQQq")
RECORDS = np.dtype([("offset", "<u8"), ("size", "<u8"), ("line", "<u8"), ("label", "<i8")])

Record = tuple[int, int, int, int]


class IndexFile(NamedTuple):
    """Index of a tar, where it lies, and its table that is read."""

    tar: str
    text: str  # path of X.idx; X.idx.bin lies beside it
    samples: int
    tar_bytes: int
    stamp: int  # of the state of the tar, see data/index/tar.py
    probe: bytes  # hash of PROBES headers of the tar; of another table than the first one, of its extension too
    start: int  # of the table in X.idx.bin
    notes: dict[str, Any]  # {} unless an image is chosen or there is something to be said

    @property
    def passed_over(self) -> PassedOver:
        """Returns what of the tar is not used."""
        return PassedOver.from_json(self.notes.get("passed_over"))


def load(tar: str, cache: ShardCache = DEFAULT, notes: bool = False) -> IndexFile | None:
    """Returns a tar's index; None if there is none, or only that of another state of the tar.

    notes  read them in any case
    """
    size, stamp = size_and_stamp(tar, cache)
    for text in index_paths(tar):
        with contextlib.suppress(OSError), open(f"{text}.bin", "rb", buffering=0) as file:
            header, length = file.read(HEADER.size), os.fstat(file.fileno()).st_size
            if not is_complete(header, length, size):
                continue
            _, _, indexed, _, _, _, told, said = HEADER.unpack(header)
            # Another time means other contents: labels may have been corrected without a change of any length.
            if indexed == stamp:
                return open_index(tar, text, header, file.read(told) if notes or said else b"")
    return None


def choose(file: IndexFile, image: str | None, maps: Set[str] = frozenset()) -> IndexFile:
    """Returns the index with the table of the chosen images.

    image  extension of the member that is the image; FIRST: of several the first; None: the only one
    maps   extensions of members that are maps beside the image, and never the image

    Raises DataError if there are several and none is chosen, or if no sample has the chosen one.
    """
    notes = file.notes
    if image in (None, FIRST) and not maps.isdisjoint(notes.get("tables", ())):
        image = _only_image(file, maps)
    if image is None and (error := tie_error(file)):
        raise error
    if image in (None, FIRST) or not file.samples:
        return file
    passed_over, tables = file.passed_over, notes["tables"]
    passed_over.counts.pop(BESIDE, None)
    if image not in tables:
        found = ", ".join(f".{name} ({count:,})" for name, (_, count, *_) in tables.items())
        raise DataError(
            f"{file.tar} has no image that ends in .{image}, only {found}. Set data.image to one of them, "
            "or to first, which takes the first of each sample."
        )
    row, count, lacking, beside = tables[image]
    if lacking:
        passed_over.add(f"samples without .{image}", lacking[1], count=lacking[0])
    if beside and set(tables) - maps - {image}:
        passed_over.add(BESIDE, beside[1], count=beside[0])
    return file._replace(
        samples=count,
        probe=hashlib.blake2b(file.probe + image.encode(), digest_size=8).digest() if row else file.probe,
        start=file.start + row * RECORD.size,
        notes=notes | {"passed_over": passed_over.to_json()},
    )


def _only_image(file: IndexFile, maps: Set[str]) -> str:
    """Returns the extension of the images that are no maps; .jpg goes before .left.jpg.

    Raises DataError if there is none, or more than one.
    """
    tables = file.notes["tables"]
    images = [name for name in tables if name not in maps]
    images = [name for name in images if name in IMAGES] or images
    if len(images) == 1:
        return images[0]
    declared = " and ".join(f".{name}" for name in sorted(maps & set(tables)))
    if not images:
        raise DataError(
            f"{file.tar} has no image beside its maps: all that could be one ends in {declared}. Check data.label_maps."
        )
    found = ", ".join(f".{name} ({tables[name][1]:,})" for name in images)
    if missing := " and ".join(f".{name}" for name in sorted(maps - set(tables))):
        raise DataError(
            f"{file.tar} has no {missing}, which data.label_maps or data.depth_maps names, and images of several "
            f"kinds: {found}. Name the one that is a map there, or set data.image to the photographs."
        )
    raise DataError(
        f"{file.tar} has images of several kinds beside its maps ({declared}): {found}. Set data.image to one of them."
    )


def tie_error(file: IndexFile) -> DataError | None:
    """Returns the refusal of samples with several images, which says how to choose one; None if there are none."""
    if not file.notes.get("tied"):
        return None
    count, key, images, names = file.notes["tied"]
    return DataError(
        f"{file.tar} has {count:,} samples with more than one image: {key!r} has {images:,}, such as {names[0]!r} and "
        f"{names[1]!r}. {say_choice(split_name(name)[1].lower() for name in names)}"
    )


def encode(
    tar_bytes: int, stamp: int, probe: bytes, first: list[Record], further: list[Record], notes: dict[str, Any]
) -> bytes:
    """Returns the contents of X.idx.bin."""
    told = json.dumps(notes).encode()
    told += b" " * (-len(told) % 8)
    said = int(any(notes.get(name) for name in ("tied", "passed_over")))
    rows = len(first) + len(further)
    header = HEADER.pack(MAGIC, tar_bytes, stamp, len(first), probe, rows, len(told), said)
    return header + told + np.array(first + further, dtype=RECORDS).tobytes()


def open_index(tar: str, text: str, header: bytes, notes: bytes) -> IndexFile:
    """Returns the index in X.idx.bin, of which these are the header and, if they are wanted, the notes."""
    _, size, stamp, samples, probe, _, length, _ = HEADER.unpack(header)
    found = json.loads(notes[:length]) if notes else {}
    return IndexFile(tar, text, samples, size, stamp, probe, HEADER.size + length, found)


def is_complete(header: bytes, length: int, tar_bytes: int) -> bool:
    """Returns whether X.idx.bin, of this length, is complete and belongs to a tar of `tar_bytes`."""
    if len(header) < HEADER.size:
        return False
    magic, described, _, _, _, rows, notes, _ = HEADER.unpack_from(header)
    return (magic, described, length) == (MAGIC, tar_bytes, HEADER.size + notes + rows * RECORD.size)


def entry(member: Member) -> str:
    """Returns a member as a line of X.idx has it."""
    return f"{split_name(member.name)[1]} {member.offset} {member.size} {member.name}"


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


def index_paths(tar: str) -> list[str]:
    """Returns the possible paths of X.idx: beside a local tar; in the cache folder, by a hash of the tar's folder."""
    folder, base = split_path(tar if is_remote(tar) else os.path.abspath(tar))
    name = base.removesuffix(".tar") + ".idx"
    cached = os.path.join(
        cache_root(), hashlib.sha256(folder.encode("utf-8", "surrogateescape")).hexdigest()[:16], name
    )
    return [cached] if is_remote(tar) else [os.path.join(folder, name), cached]


def writable_path(tar: str) -> str:
    """Returns the path at which X.idx is written; makes its folder."""
    path, *elsewhere = index_paths(tar)
    folder = Path(path).parent
    # The superuser may write anywhere, but a folder without any write permission should stay as it is.
    if elsewhere and not (os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222):
        path = elsewhere[0]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return path


def write(tar: str, text: bytes, binary: bytes) -> str:
    """Writes both files and returns the path of X.idx.

    A file that holds the same already is not replaced: others have mapped it, and of a replaced file a network file
    system keeps nothing for other machines, which would end them by SIGBUS.
    """
    path = writable_path(tar)
    for target, contents in ((path, text), (f"{path}.bin", binary)):
        if not _holds(target, contents):
            with replace_file(target) as file:
                file.write(contents)
    return path


def _holds(path: str, contents: bytes) -> bool:
    with contextlib.suppress(OSError):
        return os.path.getsize(path) == len(contents) and Path(path).read_bytes() == contents
    return False
