"""Bytes of a member of a tar, by position."""

import contextlib
import os

from data.errors import DataError
from data.storage import remote
from data.storage.cache import DEFAULT, ShardCache
from data.storage.lru import LRU
from data.storage.protocols import is_remote


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror}. Was it moved or removed while in use?") from None


def _open_copy(place: tuple[str, ShardCache]) -> int:
    url, cache = place
    while True:
        with contextlib.suppress(FileNotFoundError):  # The copy was evicted in this very moment.
            return os.open(cache.local_path(url), os.O_RDONLY | os.O_CLOEXEC)


# Positional reads share no file offset, so that a descriptor inherited by forked workers is safe to use there.
_files: LRU[str, int] = LRU(_open, os.close, limit=64)
# An evicted copy takes up room for as long as it is open: no more than a usual window of them, reopening is cheap.
_copies: LRU[tuple[str, ShardCache], int] = LRU(_open_copy, os.close, limit=16)


def _file(path: str, cache: ShardCache) -> int:
    return _copies[path, cache] if is_remote(path) else _files[path]


def read(path: str, offset: int, size: int, cache: ShardCache = DEFAULT) -> bytes:
    """`size` bytes of the file from `offset` on; of a URL from its copy in the cache, downloaded first if need be.

    DataError: the file cannot be opened or downloaded, or ends before.
    """
    if is_remote(path) and not cache.fill and not cache.has(path):
        with contextlib.suppress(remote.NoRanges):
            return remote.part(path, offset, size, cache.retry)
    try:
        data = os.pread(_file(path, cache), size, offset)
        while 0 < len(data) < size:  # A network file system may hand over less than was asked for.
            more = os.pread(_file(path, cache), size - len(data), offset + len(data))
            if not more:
                break
            data += more
    except OSError as error:
        raise DataError(f"{path} cannot be read at byte {offset}: {error.strerror}.") from None
    if len(data) != size:
        raise DataError(
            f"{path} ends before byte {offset + size}, which its index promises: it was cut short after that. "
            f"Copy it again, then run `python -m data.index {path}`."
        )
    return data


def read_line(path: str, offset: int) -> str:
    """The line of a text file that begins at this byte, without its end."""
    line = b""
    while b"\n" not in line:
        piece = os.pread(_files[path], 512, offset + len(line))
        if not piece:
            break
        line += piece
    return line.partition(b"\n")[0].decode("utf-8", "surrogateescape")
