"""Indexes of version 1, which have no notes and one table: converted where their text shows that nothing is missing."""

import contextlib
import struct
from pathlib import Path

import numpy as np

from data.index.index_file import RECORD, RECORDS, IndexFile, entry, index_paths, parse_members
from data.index.passed_over import PassedOver
from data.index.samples import CLUTTER, Part, group, split_name
from data.index.tables import write_index
from data.index.tar import BLOCK, END, open_local, size_and_stamp
from data.storage.cache import DEFAULT, ShardCache
from data.storage.protocols import is_remote

HEADER_1 = struct.Struct("<8sQqQ8s")  # magic, bytes of the tar, its stamp, records, probe
MAGIC_1 = b"maeidx01"


def load(tar: str, cache: ShardCache = DEFAULT) -> IndexFile | None:
    """Converts the index of version 1 of a tar; None if there is none, or it is that of another state of the tar."""
    for text in index_paths(tar):
        with contextlib.suppress(OSError):
            binary = Path(f"{text}.bin").read_bytes()
            if binary.startswith(MAGIC_1):
                size, stamp = size_and_stamp(tar, cache)
                if is_complete(binary, size) and HEADER_1.unpack_from(binary)[2] == stamp:
                    return convert(tar, size, stamp, binary, Path(text).read_bytes())
    return None


def is_complete(binary: bytes, tar_bytes: int) -> bool:
    """Returns whether these are the contents of an X.idx.bin of version 1 that belongs to a tar of `tar_bytes`."""
    if len(binary) < HEADER_1.size:
        return False
    magic, described, _, samples, _ = HEADER_1.unpack_from(binary)
    return (magic, described, len(binary)) == (MAGIC_1, tar_bytes, HEADER_1.size + samples * RECORD.size)


def convert(tar: str, size: int, stamp: int, binary: bytes, text: bytes) -> IndexFile | None:
    """Writes an index of version 1 anew; returns None if its text does not show that it has all of the tar."""
    records = np.frombuffer(binary, RECORDS, offset=HEADER_1.size)
    parts, end = _listed_parts(text, dict(zip(records["line"].tolist(), records["label"].tolist(), strict=True)))
    if not end or size - end >= END:
        return None
    if not is_remote(tar):
        with open_local(tar) as opened:
            if any(opened.pread(END, end)):
                return None
    passed_over = PassedOver()
    samples, firsts = group(tar, parts, passed_over)
    if [image.offset for image, _ in firsts] != records["offset"].tolist():
        return None
    return write_index(tar, size, stamp, HEADER_1.unpack_from(binary)[4], samples, firsts, passed_over)


def _listed_parts(text: bytes, labels: dict[int, int]) -> tuple[list[Part], int]:
    """Returns the members in X.idx, and where the last one ends in the tar; 0 if there are gaps, or unknown labels.

    labels  of the samples, by the start of their line
    """
    parts: list[Part] = []
    end, position = 0, text.find(b"\n") + 1
    for contents in text[position:].splitlines(keepends=True):
        line = contents.decode("utf-8", "surrogateescape").rstrip("\n")
        members = list(parse_members(line))
        if line != " ".join(map(entry, members)):
            return [], 0
        for member in members:
            key, extension = split_name(member.name)
            label = labels.get(position, -1) if extension.lower() == "cls" else -1
            gap = member.offset - end != BLOCK
            if gap or (extension.lower() == "cls" and label < 0) or not CLUTTER.isdisjoint(key.split("/")):
                return [], 0
            parts.append(Part(key, extension.lower(), member, label))
            end = member.offset + -(-member.size // BLOCK) * BLOCK
        position += len(contents)
    return parts, end
