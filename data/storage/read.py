"""Positional reads (pread) of local files and of the cached copies of remote shards."""

import contextlib
import os

from data.errors import DataError
from data.storage import remote
from data.storage.cache import DEFAULT, ShardCache
from data.storage.lru import LRU
from data.storage.protocols import is_remote

# Of what is read at once, and held in memory: 2^31 values of 16 bits, the most that an image may have, and a header.
MAX_BYTES = (1 << 32) + (1 << 20)


def require_readable(path: str, size: int) -> None:
    """Raises DataError if something is too large to be read at once."""
    if size > MAX_BYTES:
        raise DataError(f"{path}: {size:,} bytes are above the limit of {MAX_BYTES:,} for one file of a sample")


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror}. Was it moved or removed while in use?") from None


def _open_copy(place: tuple[str, ShardCache]) -> int:
    url, cache = place
    while True:
        with contextlib.suppress(FileNotFoundError):  # The copy was evicted before it could be opened.
            return os.open(cache.fetch(url), os.O_RDONLY)


# pread uses no shared file offset, so forked workers can safely use descriptors that they inherit.
_files: LRU[str, int] = LRU(_open, os.close, limit=64)
# An evicted copy takes up disk space while it is open, so keep no more open than a usual window has.
_copies: LRU[tuple[str, ShardCache], int] = LRU(_open_copy, os.close, limit=16)


def read(path: str, offset: int, size: int, cache: ShardCache = DEFAULT) -> bytes:
    """Returns `size` bytes from `offset` on; for a URL those of its cached copy, downloaded first if needed.

    Raises DataError if the file cannot be opened or downloaded, ends too early, or if that is more than MAX_BYTES.
    """
    require_readable(path, size)
    if is_remote(path) and not cache.fill and not cache.has(path):
        with contextlib.suppress(remote.NoRanges):
            return remote.read_range(path, offset, size, cache.retry)
    try:
        file = _copies[path, cache] if is_remote(path) else _files[path]
        data = os.pread(file, size, offset)
        while 0 < len(data) < size:  # A network file system may return fewer bytes than requested.
            more = os.pread(file, size - len(data), offset + len(data))
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
    """Returns the line of a text file that begins at byte `offset`, without its line break."""
    line = b""
    while b"\n" not in line:
        piece = os.pread(_files[path], 512, offset + len(line))
        if not piece:
            break
        line += piece
    return line.partition(b"\n")[0].decode("utf-8", "surrogateescape")
