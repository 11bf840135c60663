"""Bytes of a member of a tar, by position."""

import os

from data.errors import DataError
from data.recent import Recent


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error.strerror}. Was it moved or removed while in use?") from None


# Positional reads share no file offset, so that a descriptor inherited by forked workers is safe to use there.
_files: Recent[str, int] = Recent(_open, os.close, limit=64)


def read(path: str, offset: int, size: int) -> bytes:
    """`size` bytes of the file from `offset` on. DataError: the file cannot be opened, or ends before."""
    try:
        data = os.pread(_files[path], size, offset)
        while 0 < len(data) < size:  # A network file system may hand over less than was asked for.
            more = os.pread(_files[path], size - len(data), offset + len(data))
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
