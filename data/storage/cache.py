"""Copies of remote shards on this machine's disk."""

import functools
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from data.atomic import publish
from data.errors import DataError
from data.storage import remote
from data.storage.in_use import held, locked, pinned
from data.storage.protocols import Retry, split_path

SPARE = 1 << 30  # bytes that are left free on the disk


def root() -> str:
    """The folder for what is kept between runs: $MAE_CACHE or ~/.cache/mae-index."""
    return os.environ.get("MAE_CACHE") or os.path.join(os.path.expanduser("~"), ".cache", "mae-index")


@dataclass(frozen=True)
class ShardCache:
    """One copy of each remote shard per machine, downloaded when it is first asked for by any of its processes.

    folder  where: FOLDER/shards/…; by default `root()`. It has to be a disk of this machine: locks rely on it
    limit   bytes of all copies together; the longest unused ones go first, pinned ones never. Copies that a reader
            still has open come on top. None: as much as the disk holds

    Holds settings alone, so that it may be pickled and compared; what there is stands on the disk.
    """

    folder: str | None = None
    limit: float | None = None
    retry: Retry = remote.RETRY
    fill: bool = True  # False: `data.read` asks the server for single images of shards that have no copy

    @property
    def shards(self) -> str:
        return os.path.join(self.folder or root(), "shards")

    def place(self, url: str) -> str:
        """Where the copy of a shard lies, or will lie."""
        folder, name = split_path(url)
        return os.path.join(self.shards, hashlib.sha256(folder.encode()).hexdigest()[:16], name)

    def local_path(self, url: str) -> str:
        """The path of a complete copy; waits for it if need be. DataError: it cannot be downloaded."""
        path = self.place(url)
        if not _touch(path):
            self.make_folder(os.path.dirname(path))
            with locked(f"{path}.lock"):
                if not _touch(path):  # Else another process has been first.
                    self.retry.persist(url, lambda: self._download(url, path))
        return path

    def has(self, url: str) -> bool:
        return os.path.exists(self.place(url))

    def forget_other_states(self, url: str, stamp: int) -> None:
        """Removes the copy of a shard if it was made from another state of it."""
        path = Path(self.place(url))
        if path.exists() and not (_state_file(path).exists() and _state_file(path).read_text() == str(stamp)):
            with locked(os.path.join(self.shards, "lock")):
                path.unlink(missing_ok=True)

    def make_folder(self, path: str) -> None:
        """Makes a folder of the cache. DataError: that is not allowed, or impossible."""
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
            remote.download(url, part)
            _check(url, part, state.bytes, self.retry)
            _state_file(Path(path)).write_text(str(state.stamp))
            publish(part, path)
        finally:
            Path(part).unlink(missing_ok=True)
            Path(room).unlink(missing_ok=True)

    def _make_room(self, needed: int, room: str) -> None:
        """Evicts until so many bytes fit, and reserves them: others download at the same time."""
        with locked(os.path.join(self.shards, "lock")):
            copies = {str(copy): copy.stat() for copy in Path(self.shards).glob("*/*.tar")}
            excess = needed + SPARE - shutil.disk_usage(self.shards).free
            if self.limit is not None:
                taken = sum(copy.st_size for copy in copies.values()) + self._reserved()
                excess = max(excess, needed + taken - self.limit)
            kept = pinned(self.shards) if excess > 0 else set()
            for path in sorted(copies.keys() - kept, key=lambda path: copies[path].st_mtime_ns):
                if excess <= 0:
                    break
                os.unlink(path)
                excess -= copies[path].st_size
            Path(room).touch()
            os.truncate(room, needed)  # an empty file of that length

    def _reserved(self) -> int:
        """Bytes of the downloads that are under way; reservations of processes that died are dropped."""
        reserved = 0
        for room in Path(self.shards).glob("*/*.room"):
            if held(str(room.with_suffix(".lock"))):
                reserved += room.stat().st_size
            else:
                room.unlink()
        return reserved


DEFAULT = ShardCache()


def _touch(path: str) -> bool:
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _state_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.state")


def _check(url: str, path: str, size: int, retry: Retry) -> None:
    """OSError, upon which it is downloaded again, if a copy is not what the server or manifest.json says."""
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
    """sha256 by file name, from the manifest.json beside the shards; {} without one."""
    manifest = remote.manifest(folder, retry)
    lists = [manifest, *(part for part in manifest.get("splits", {}).values() if isinstance(part, dict))]
    shards = [shard for part in lists for shard in part.get("shards", []) if isinstance(shard, dict)]
    return {shard["file"]: shard["sha256"] for shard in shards if "file" in shard and "sha256" in shard}
