"""Atomic replacement of files and folders: a path holds its old contents or all of the new ones.

1 write    under a temporary name beside the path, which no other process uses
2 flush    the contents to the disk
3 rename   to the path
4 flush    the folder that it is in, so that a crash of the machine does not undo the rename
"""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

CANNOT_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EACCES)


@contextlib.contextmanager
def replace_file(path: str | Path, mode: str = "wb", errors: str | None = None) -> Iterator[IO[Any]]:
    """Opens a new file, as `open` does, that replaces `path` when the block ends and is removed if it raises.

    Text is UTF-8 in any locale. Several processes may replace the same file at once: the last one wins.
    """
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8", errors=errors) as file:
            yield file
        publish(temporary, path)
    finally:
        with contextlib.suppress(OSError):  # as it is gone when all went well
            os.unlink(temporary)


def publish(temporary: str | Path, path: str | Path) -> None:
    """Renames a complete file or folder to `path`, with everything on the disk before and after."""
    _flush(temporary)
    os.replace(temporary, path)
    _flush(Path(path).parent)


def _flush(path: str | Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        # Some network file systems do not flush folders, and a folder may be writable but not readable.
        if error.errno not in CANNOT_FLUSH:
            raise
