"""Directory listing, on this machine or behind a URL."""

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.storage import remote
from data.storage.credentials import hide, reveal
from data.storage.protocols import HTTP, PROTOCOLS, Missing, Retry, file_system, is_remote

LISTING = Retry(attempts=5, first=0.5)  # Fewer attempts than for reading: the user is waiting.


class Folder:
    """A folder on this machine or behind a URL. Over HTTP it holds what its manifest.json names: no server lists it."""

    def __init__(self, path: str, retry: Retry = LISTING):
        self.remote, self.retry = is_remote(path), retry
        self.path = path.rstrip("/") if self.remote else path
        self.lists = not self.remote or PROTOCOLS.get(path.partition("://")[0]) is not HTTP

    def file(self, name: str) -> str:
        return f"{self.path}/{name}" if self.remote else os.path.join(self.path, name)

    def folder(self, name: str) -> "Folder":
        return Folder(self.file(name), self.retry)

    def folders(self, names: Collection[str]) -> list[str]:
        """Returns the sub-folders whose names in lower case are among `names`."""
        if self.lists:
            return [name for name, kind in self._entries() if kind == "directory" and name.lower() in names]
        return [name for name in sorted(names) if self.folder(name).manifest() is not None]

    def files(self, endings: tuple[str, ...]) -> list[str]:
        """Returns the files that end in one of `endings`. Raises DataError if one is a link that leads nowhere."""
        if self.lists:
            kinds = {name: kind for name, kind in self._entries() if name.endswith(endings)}
            if lost := next((name for name, kind in kinds.items() if kind == "lost"), None):
                raise DataError(f"{self.file(lost)} is a link that leads nowhere. Bring back its target, or remove it.")
            return [name for name, kind in kinds.items() if kind == "file"]
        shards = (self.manifest() or {}).get("shards", [])
        names = [shard.get("file") if isinstance(shard, dict) else shard for shard in shards]
        return sorted(name for name in names if isinstance(name, str) and name.endswith(endings))

    def manifest(self) -> dict[str, Any] | None:
        """Returns manifest.json, as `data.pack` writes it; None if there is none."""
        place = self.file("manifest.json")
        try:
            contents = remote.contents(place, self.retry) if self.remote else Path(place).read_bytes()
            # Earlier versions wrote names that are not UTF-8 as they were.
            found = json.loads(contents.decode("utf-8", "surrogateescape"))
        except (Missing, FileNotFoundError):
            return None
        except ValueError as error:
            raise DataError(f"{place} is not JSON ({error}). Restore it or remove it.") from None
        return found if isinstance(found, dict) else {}

    def _entries(self) -> list[tuple[str, str]]:
        """Returns the names in the folder, and of what kind each is: directory, file, or lost for a dead link."""
        if not self.remote:
            with os.scandir(self.path) as entries:
                return sorted((entry.name, kind) for entry in entries if (kind := _kind(entry)))
        listed = self.retry.persist(self.path, lambda: file_system(self.path).ls(reveal(self.path), detail=True))
        return sorted((entry["name"].rstrip("/").rpartition("/")[2], entry["type"]) for entry in listed)


def _kind(entry: os.DirEntry[str]) -> str:
    if entry.is_symlink() and not os.path.exists(entry):
        return "" if entry.name.startswith(".") else "lost"  # editors lock files with hidden links
    return "directory" if entry.is_dir() else "file" if entry.is_file() else ""


def expand_glob(pattern: str) -> list[str]:
    """Returns the URLs that match a glob. Raises DataError if a web server lists none."""
    system, scheme = file_system(pattern), pattern.partition("://")[0]
    found = LISTING.persist(pattern, lambda: system.glob(reveal(pattern)))
    if not found and PROTOCOLS[scheme] is HTTP:
        raise DataError(
            f"no file matches {pattern}, as far as the server lists its files. Check the pattern, give a range of "
            "numbers such as {000000..000127}, or name a folder with a manifest.json (`python -m data.pack` writes it)."
        )
    return sorted(hide(name if "://" in name else f"{scheme}://{name}") for name in found)
