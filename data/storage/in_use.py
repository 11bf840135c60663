"""File locks (flock) between the processes of a machine, and pins: cached shards that must not be evicted.

Each trainer writes the paths that it is about to read to a file ID.pins and holds a lock on this file while it runs, so
that the pins end with their owner, even if it is killed. FOLDER/lock is held while a file of pins is created, written
or read.
"""

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path


class Pins:
    """Pins of one trainer, in an existing folder."""

    def __init__(self, folder: str):
        self.folder = folder
        # Without the folder's lock `read_pins` might see the file before it is locked, and take its owner for dead.
        with locked(os.path.join(folder, "lock")):
            self._file = os.open(os.path.join(folder, f"{uuid.uuid4().hex}.pins"), os.O_RDWR | os.O_CREAT)
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def set(self, paths: Iterable[str]) -> None:
        """Replaces the pinned paths."""
        contents = "\n".join(paths).encode()
        with locked(os.path.join(self.folder, "lock")):
            os.pwrite(self._file, contents, 0)
            os.truncate(self._file, len(contents))

    def close(self) -> None:
        self.set([])
        fcntl.flock(self._file, fcntl.LOCK_UN)  # The next `read_pins` removes the file.
        os.close(self._file)


def read_pins(folder: str) -> set[str]:
    """Returns what all running trainers have pinned. The caller holds the folder's lock."""
    paths: set[str] = set()
    for place in Path(folder).glob("*.pins"):
        if is_locked(place):
            paths.update(place.read_text().splitlines())
        else:
            place.unlink()
    return paths


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Holds the lock of a path within the block; waits for other processes and threads of this machine."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            # Closing is not enough: a worker forked meanwhile has the descriptor too and would keep the lock.
            fcntl.flock(file, fcntl.LOCK_UN)


def is_locked(path: str | Path) -> bool:
    """Returns whether some process or thread is inside `locked(path)`."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        fcntl.flock(file, fcntl.LOCK_UN)
        return False
