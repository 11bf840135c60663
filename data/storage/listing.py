"""Directory listing, on this machine or behind a URL."""

import os
from collections.abc import Iterable

from data.errors import DataError
from data.storage import remote
from data.storage.protocols import HTTP, PROTOCOLS, Missing, Retry, file_system

MANIFEST = "manifest.json"
LISTING = Retry(attempts=5, first=0.5)  # Fewer attempts than for reading: the user is waiting.


class LocalFolder:
    """A folder on this machine."""

    def __init__(self, path: str):
        self.path = path

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def folder(self, name: str) -> "LocalFolder":
        return LocalFolder(self.file(name))

    def folders(self, names: Iterable[str]) -> list[str]:
        """Returns the sub-folders whose names in lower case are among `names`."""
        wanted = set(names)
        with os.scandir(self.path) as entries:
            return sorted(entry.name for entry in entries if entry.name.lower() in wanted and entry.is_dir())

    def files(self, endings: tuple[str, ...]) -> list[str]:
        """Returns the files that end in one of `endings`."""
        with os.scandir(self.path) as entries:
            return sorted(entry.name for entry in entries if entry.name.endswith(endings) and entry.is_file())

    def manifest(self) -> bytes | None:
        try:
            with open(self.file(MANIFEST), "rb") as file:
                return file.read()
        except FileNotFoundError:
            return None

    def exists(self, path: str) -> bool:
        return os.path.exists(path)


class RemoteFolder:
    """A folder behind a URL. Web servers do not list theirs: over HTTP it holds what its manifest.json names."""

    def __init__(self, url: str):
        self.path = url.rstrip("/")
        self.lists = PROTOCOLS.get(url.partition("://")[0]) is not HTTP

    def file(self, name: str) -> str:
        return f"{self.path}/{name}"

    def folder(self, name: str) -> "RemoteFolder":
        return RemoteFolder(self.file(name))

    def folders(self, names: Iterable[str]) -> list[str]:
        if self.lists:
            return [name for name, kind in self._entries() if kind == "directory" and name.lower() in set(names)]
        return [name for name in sorted(names) if self.folder(name).manifest() is not None]

    def files(self, endings: tuple[str, ...]) -> list[str]:
        if self.lists:
            return [name for name, kind in self._entries() if kind == "file" and name.endswith(endings)]
        shards = remote.manifest(self.path, LISTING).get("shards", [])
        names = [shard.get("file") if isinstance(shard, dict) else shard for shard in shards]
        return sorted(name for name in names if isinstance(name, str) and name.endswith(endings))

    def manifest(self) -> bytes | None:
        try:
            return remote.contents(self.file(MANIFEST), LISTING)
        except Missing:
            return None

    def exists(self, path: str) -> bool:
        return True  # Thousands of requests would take too long; indexing reports a shard that is missing.

    def _entries(self) -> list[tuple[str, str]]:
        listed = LISTING.persist(self.path, lambda: file_system(self.path).ls(self.path, detail=True))
        return sorted((entry["name"].rstrip("/").rpartition("/")[2], entry["type"]) for entry in listed)


Folder = LocalFolder | RemoteFolder


def expand_glob(pattern: str) -> list[str]:
    """Returns the URLs that match a glob. Raises DataError if a web server lists none."""
    system, scheme = file_system(pattern), pattern.partition("://")[0]
    found = LISTING.persist(pattern, lambda: system.glob(pattern))
    if not found and PROTOCOLS[scheme] is HTTP:
        raise DataError(
            f"no file matches {pattern}, as far as the server lists its files. Check the pattern, give a range of "
            "numbers such as {000000..000127}, or name a folder with a manifest.json (`python -m data.pack` writes it)."
        )
    return sorted(name if "://" in name else f"{scheme}://{name}" for name in found)
