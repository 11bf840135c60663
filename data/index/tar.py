"""Members of a tar and where their bytes lie, from the 512-byte headers alone."""

import contextlib
import os
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from data.errors import DataError
from data.index.passed_over import BYTES, ZEROS, PassedOver
from data.storage import remote
from data.storage.cache import DEFAULT, ShardCache
from data.storage.protocols import is_remote

BLOCK = 512
END = 10240 + 2 * BLOCK  # bytes of zeros that end a tar, below this
FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
NO_CONTENTS = (*LINKS, tarfile.DIRTYPE)
# Headers whose contents are a long name (GNU) or fields (pax) of the header that follows.
GNU_NAME, PAX = tarfile.GNUTYPE_LONGNAME, (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
OTHER_WRAPPERS = (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE)
MAX_WRAPPER = 1 << 20  # bytes; anything longer is damage
CHUNK = 1 << 20  # bytes that are searched at a time for what follows the end of an archive
# Files that are called .tar and are something else.
BEGINNINGS = (
    (b"\x1f\x8b", "but compressed with gzip"),
    (b"BZh", "but compressed with bzip2"),
    (b"\xfd7zXZ", "but compressed with xz"),
    (b"\x28\xb5\x2f\xfd", "but compressed with zstd"),
    (b"PK\x03\x04", "but a zip archive"),
    (b"version https://git-lfs", "but a pointer of Git LFS: `git lfs pull` fetches what it stands for"),
    (b"<", "but a web page or XML, such as a server sends in the place of a file"),
)


class Member(NamedTuple):
    name: str
    offset: int  # of the first byte of the contents
    size: int


class TarBytes(NamedTuple):
    """An open tar."""

    path: str
    size: int
    stamp: int  # int64; differs between states of the tar
    pread: Callable[[int, int], bytes]  # (size, offset) → bytes


def walk(tar: TarBytes, passed_over: PassedOver | None = None) -> Iterator[Member]:
    """Yields the regular files of a tar, in order, by stepping from header to header.

    Goes on behind the end of an archive if another one follows (`cat a.tar b.tar`). Links, devices and bytes that are
    no archive are counted in `passed_over`.

    Raises DataError if it is not a tar, or truncated or damaged, even where `tarfile` sees the end of the archive, and
    for a member that is stored with holes.
    """
    if tar.size == 0:
        raise DataError(f"{tar.path} is empty (0 bytes). Copy or download it again.")
    passed_over = PassedOver() if passed_over is None else passed_over
    position, name, size, sparse = 0, None, None, False
    while position < tar.size:
        block = tar.pread(BLOCK, position)
        if block.count(0) == BLOCK:
            position, name, size, sparse = _next_archive(tar, position, passed_over), None, None, False
            continue
        info = _header(block, position, tar.path)
        start, length = position + BLOCK, info.size if size is None else size
        if info.type in NO_CONTENTS:
            length = 0  # Some programs state the length of what a hard link leads to.
        if not 0 <= length <= tar.size - start:
            raise DataError(
                f"{tar.path} is truncated: its member {name or info.name!r} should end at byte {start + length}, "
                f"the file at {tar.size}. Copy or download it again."
            )
        if info.type == GNU_NAME:
            name = tar.pread(min(length, MAX_WRAPPER), start).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type in PAX:
            fields = _pax_fields(tar.pread(min(length, MAX_WRAPPER), start), position, tar.path)
            name = fields.get("GNU.sparse.name", fields.get("path", name))
            size = int(fields["size"]) if fields.get("size", "").isdigit() else size
            sparse = any(field.startswith("GNU.sparse.") for field in fields)
        elif info.type not in OTHER_WRAPPERS:
            if sparse or info.type == tarfile.GNUTYPE_SPARSE:
                raise DataError(
                    f"{tar.path} holds {name or info.name!r} with holes (tar -S), so that its bytes do not lie in one "
                    "piece. Make the tar anew without -S."
                )
            if info.type in FILES:
                yield Member(name or info.name, start, length)
            elif info.type != tarfile.DIRTYPE:
                passed_over.add("links in tars" if info.type in LINKS else "special files", name or info.name)
            name, size = None, None
        position = start + -(-length // BLOCK) * BLOCK


def _next_archive(tar: TarBytes, end: int, passed_over: PassedOver) -> int:
    """Returns where another archive begins behind the zeros that end one; the length of the tar if none does."""
    position = end
    while chunk := tar.pread(CHUNK, position):
        if rest := chunk.lstrip(b"\0"):
            start = (position + len(chunk) - len(rest)) // BLOCK * BLOCK
            try:
                tarfile.TarInfo.frombuf(tar.pread(BLOCK, start), "utf-8", "surrogateescape")
            except tarfile.HeaderError:
                passed_over.add(BYTES, tar.path, count=tar.size - start)
                return tar.size
            return start
        position += len(chunk)
    if tar.size - end >= END:
        passed_over.add(ZEROS, tar.path, count=tar.size - end)
    return tar.size


class Header(NamedTuple):
    """Fields of a header that say what follows it."""

    name: str
    size: int
    type: bytes


def _header(block: bytes, position: int, path: str) -> Header | tarfile.TarInfo:
    """Parses a header. Raises DataError if it is none, or damaged."""
    # Plain files with short names, which is nearly all members, take less than half the time of tarfile.
    if block[156:157] == tarfile.REGTYPE and len(block) == BLOCK and not block[345]:
        with contextlib.suppress(ValueError):
            size, checksum = (int(block[start:end].strip(b" \0"), 8) for start, end in ((124, 136), (148, 156)))
            if checksum == sum(block) - sum(block[148:156]) + 8 * ord(" ") and size >= 0:
                name = block[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
                return Header(name, size, tarfile.REGTYPE)
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        if position == 0:
            what = next((words for start, words in BEGINNINGS if block.startswith(start)), str(error))
            raise DataError(f"{path} is not a tar archive ({what}). Make it one, or download it again.") from None
        what = "is truncated" if len(block) < BLOCK else "is damaged"
        raise DataError(f"{path} {what} at byte {position} ({error}). Copy or download it again.") from None


def _pax_fields(data: bytes, position: int, path: str) -> dict[str, str]:
    """Parses the records `LENGTH KEY=VALUE\\n` of a pax header; LENGTH counts the whole record (POSIX.1-2001, pax)."""
    fields = {}
    while data.strip(b"\0"):
        length, space, _ = data.partition(b" ")
        if not (space and length.isdigit() and len(length) < int(length) <= len(data)):
            raise DataError(f"{path} is damaged: unreadable pax header at byte {position}. Copy or download it again.")
        record, data = data[len(length) + 1 : int(length)], data[int(length) :]
        key, _, value = record.rstrip(b"\n").partition(b"=")
        fields[key.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
    return fields


def size_and_stamp(tar: str, cache: ShardCache = DEFAULT) -> tuple[int, int]:
    """Returns (bytes, stamp) of a tar as it is now. The stamp of a local one is its mtime in ns."""
    if is_remote(tar):
        return remote.state(tar, cache.retry)[:2]
    state = os.stat(tar)
    return state.st_size, state.st_mtime_ns


@contextlib.contextmanager
def open_local(tar: str, path: str | None = None, stamp: int | None = None) -> Iterator[TarBytes]:
    """Opens a tar on this machine, or its copy at `path` with the stamp of the original."""
    with open(path or tar, "rb", buffering=0) as file:
        state = os.fstat(file.fileno())
        stamp = state.st_mtime_ns if stamp is None else stamp
        yield TarBytes(tar, state.st_size, stamp, partial(os.pread, file.fileno()))


def open_remote(tar: str, cache: ShardCache = DEFAULT) -> TarBytes:
    """Opens a remote tar for range requests. Raises NoRanges if the server sends whole files only."""
    state = remote.state(tar, cache.retry)
    return TarBytes(tar, state.bytes, state.stamp, remote.Ranges(tar, state, cache.retry).pread)
