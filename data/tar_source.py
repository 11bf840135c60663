"""The bytes of a tar by position, wherever it lies."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data.storage import remote
from data.storage.cache import DEFAULT, ShardCache
from data.storage.protocols import is_remote


class Source(NamedTuple):
    """One tar, open."""

    path: str
    size: int
    stamp: int  # int64: tells this state of the tar from an earlier one
    pread: Callable[[int, int], bytes]  # size, offset


def stamp(tar: str, cache: ShardCache = DEFAULT) -> tuple[int, int]:
    """(bytes, stamp) of a tar as it is now: a local one's stamp is its mtime in ns."""
    if is_remote(tar):
        return remote.state(tar, cache.retry)[:2]
    state = os.stat(tar)
    return state.st_size, state.st_mtime_ns


@contextlib.contextmanager
def local(tar: str, path: str | None = None, stamp: int | None = None) -> Iterator[Source]:
    """A tar on this machine; of a copy at another path with the stamp of the original."""
    file = os.open(path or tar, os.O_RDONLY)
    try:
        state = os.fstat(file)
        stamp = state.st_mtime_ns if stamp is None else stamp
        yield Source(tar, state.st_size, stamp, lambda size, offset: os.pread(file, size, offset))
    finally:
        os.close(file)


def in_parts(tar: str, cache: ShardCache = DEFAULT) -> Source:
    """A remote tar, of which only what is asked for is sent. NoRanges: the server sends whole files only."""
    state = remote.state(tar, cache.retry)
    return Source(tar, state.bytes, state.stamp, remote.Ranges(tar, state, cache.retry).pread)
