"""Cache of remote shards on a disk of this machine, shared by all its processes.

shards/ID.pins              what one trainer is about to read, see in_use.py
shards/lock                 held while pins are written, and while copies are evicted and room is reserved
shards/HASH/X.tar           a complete copy; HASH stands for the folder of the URL
shards/HASH/X.tar.lock      held during the download, for which other processes wait
shards/HASH/X.tar.part      the download
shards/HASH/X.tar.room      its reservation: an empty file as long as the shard
shards/HASH/X.tar.state     the stamp of the remote file that was copied
"""

import functools
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from data.atomic import publish
from data.errors import DataError
from data.storage import remote
from data.storage.credentials import reveal
from data.storage.in_use import is_locked, locked, read_pins
from data.storage.listing import Folder
from data.storage.protocols import Retry, file_system, split_path

SPARE_BYTES = 1 << 30  # left free on the disk


def cache_root() -> str:
    """Returns the folder for what is kept between runs: $MAE_CACHE or ~/.cache/mae-index."""
    return os.environ.get("MAE_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "mae-index")


@dataclass(frozen=True)
class ShardCache:
    """LRU cache with one copy of each remote shard per machine, downloaded on first use.

    folder  holds shards/; default `cache_root()`. On a disk of this machine, since flock has to work
    limit   bytes of all copies; the least recently used are evicted first, pinned ones never. Copies that a reader
            still has open come on top. None: as much as the disk holds

    Holds settings only, so that it can be pickled and compared.
    """

    folder: str | None = None
    limit: float | None = None
    retry: Retry = remote.RETRY
    fill: bool = True  # False: `read` requests single images of shards without a copy from the server

    @property
    def shards(self) -> str:
        return os.path.join(self.folder or cache_root(), "shards")

    def copy_path(self, url: str) -> str:
        """Returns the path of a shard's copy, whether or not it exists."""
        folder, name = split_path(url)
        return os.path.join(self.shards, hashlib.sha256(folder.encode()).hexdigest()[:16], name)

    def fetch(self, url: str) -> str:
        """Returns the path of a complete copy, downloaded first if needed. Raises DataError if that fails."""
        path = self.copy_path(url)
        if not _touch(path):
            self.make_folder(os.path.dirname(path))
            with locked(f"{path}.lock"):
                if not _touch(path):  # Another process may have downloaded it meanwhile.
                    self.retry.persist(url, lambda: self._download(url, path))
        return path

    def has(self, url: str) -> bool:
        return os.path.exists(self.copy_path(url))

    def forget_other_states(self, url: str, stamp: int) -> None:
        """Removes the copy of a shard unless it was made from the state with this stamp."""
        path = Path(self.copy_path(url))
        state = Path(f"{path}.state")
        if path.exists() and not (state.exists() and state.read_text() == str(stamp)):
            with locked(os.path.join(self.shards, "lock")):
                path.unlink(missing_ok=True)

    def make_folder(self, path: str) -> None:
        """Creates a folder of the cache. Raises DataError if that is not possible."""
        try:
            os.makedirs(path, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"the cache folder {path} cannot be made: {error.strerror}. Set data.cache or MAE_CACHE to a folder on "
                "a disk of this machine."
            ) from None

    def _download(self, url: str, path: str) -> None:
        state = remote.state_now(url)
        part, room = f"{path}.part", f"{path}.room"
        self._make_room(state.bytes, room)
        try:
            file_system(url).get_file(reveal(url), part)
            _check(url, part, state.bytes, self.retry)
            Path(f"{path}.state").write_text(str(state.stamp))
            publish(part, path)
        finally:
            Path(part).unlink(missing_ok=True)
            Path(room).unlink(missing_ok=True)

    def _make_room(self, needed: int, room: str) -> None:
        """Evicts copies until `needed` bytes fit, and reserves these against other downloads."""
        with locked(os.path.join(self.shards, "lock")):
            copies = {str(copy): copy.stat() for copy in Path(self.shards).glob("*/*.tar")}
            excess = needed + SPARE_BYTES - shutil.disk_usage(self.shards).free
            if self.limit is not None:
                taken = sum(copy.st_size for copy in copies.values()) + self._reserved()
                excess = max(excess, needed + taken - self.limit)
            pinned = read_pins(self.shards) if excess > 0 else set()
            for path in sorted(copies.keys() - pinned, key=lambda path: copies[path].st_mtime_ns):
                if excess <= 0:
                    break
                os.unlink(path)
                excess -= copies[path].st_size
            Path(room).touch()
            os.truncate(room, needed)

    def _reserved(self) -> int:
        """Returns the bytes that running downloads have reserved; removes reservations of processes that died."""
        reserved = 0
        for room in Path(self.shards).glob("*/*.room"):
            if is_locked(str(room.with_suffix(".lock"))):
                reserved += room.stat().st_size
            else:
                room.unlink()
        return reserved


DEFAULT = ShardCache()


def _touch(path: str) -> bool:
    """Marks a copy as just used; returns False if there is none."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    except OSError:  # It is another user's, or on a disk that is mounted for reading only.
        return os.path.exists(path)
    return True


def _check(url: str, path: str, size: int, retry: Retry) -> None:
    """Raises OSError, which triggers a new download, if length or SHA-256 differ from server or manifest.json."""
    if (found := os.path.getsize(path)) != size:
        raise OSError(f"{found} of {size} bytes arrived")
    folder, name = split_path(url)
    expected = _checksums(folder, retry).get(name)
    if expected is None:
        return
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        _checksums.cache_clear()  # The shard and its manifest may both have been replaced.
        raise OSError(f"its checksum is {found[:16]}…, manifest.json says {expected[:16]}…")


@functools.lru_cache(maxsize=64)
def _checksums(folder: str, retry: Retry) -> dict[str, str]:
    """Returns the SHA-256 of each file that manifest.json beside the shards lists; {} without one."""
    manifest = Folder(folder, retry).manifest() or {}
    lists = [manifest, *(part for part in manifest.get("splits", {}).values() if isinstance(part, dict))]
    shards = [shard for part in lists for shard in part.get("shards", []) if isinstance(shard, dict)]
    return {shard["file"]: shard["sha256"] for shard in shards if "file" in shard and "sha256" in shard}
