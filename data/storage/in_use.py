"""Which cached shards running trainers are about to read: told between processes by files that die with their owner.

Each owner keeps one file in the folder, with a path a line, and holds a lock on it for as long as it runs.
"""

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path


class Pins:
    """The pins of one owner, in a folder that exists."""

    def __init__(self, folder: str):
        self.folder = folder
        with locked(os.path.join(folder, "lock")):  # Or its file would be taken for that of a dead owner.
            self._file = os.open(os.path.join(folder, f"{uuid.uuid4().hex}.pins"), os.O_RDWR | os.O_CREAT)
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def set(self, paths: Iterable[str]) -> None:
        """Replaces what was pinned."""
        contents = "\n".join(paths).encode()
        with locked(os.path.join(self.folder, "lock")):
            os.pwrite(self._file, contents, 0)
            os.truncate(self._file, len(contents))

    def close(self) -> None:
        self.set([])
        fcntl.flock(self._file, fcntl.LOCK_UN)  # Whoever asks next for what is pinned removes the file.
        os.close(self._file)


def pinned(folder: str) -> set[str]:
    """What all owners that still run have pinned; to be called with the folder's lock held."""
    paths: set[str] = set()
    for place in Path(folder).glob("*.pins"):
        with open(place) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                paths.update(file.read().splitlines())
            else:
                place.unlink()
    return paths


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Waits until no other process or thread of this machine is inside for the same path."""
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        # Closing would not do: a worker forked meanwhile has the descriptor too, and would go on holding the lock.
        fcntl.flock(file, fcntl.LOCK_UN)
        os.close(file)


def held(path: str) -> bool:
    """Whether someone is inside `locked` for this path."""
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        fcntl.flock(file, fcntl.LOCK_UN)
        return False
    finally:
        os.close(file)
