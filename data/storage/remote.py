"""A file behind a URL: its state, its bytes by position, a copy of it."""

import hashlib
import json
from typing import Any, NamedTuple

from data.errors import DataError
from data.storage.protocols import Missing, Retry, file_system

RETRY = Retry()
STATE_FIELDS = ("ETag", "etag", "md5Hash", "blob_id", "Last-Modified", "LastModified", "last_modified", "updated")
SHORTEST, LONGEST = 1 << 16, 1 << 22  # bytes per request
NEAR = 1 << 18  # Reading on over a gap of this length costs less than another request.


class NoRanges(Exception):
    """The server sends whole files only."""


class State(NamedTuple):
    """What a file is now."""

    bytes: int
    stamp: int  # int64, over the length and what else the server tells: another one means another content
    ranges: bool  # whether parts may be asked for, as far as the server says


def state(url: str, retry: Retry = RETRY) -> State:
    """DataError: there is no such file, it may not be read, or its length is unknown."""
    return retry.persist(url, lambda: state_now(url))


def state_now(url: str) -> State:
    """As `state`, in one attempt: to be called through `Retry.persist`, as it raises what the file system raises."""
    info = file_system(url).info(url)
    size = info.get("size")
    if info.get("type") == "directory":
        raise DataError(f"{url} is a folder. Name the shards in it, or end it in a slash to take all of them.")
    if size is None:
        raise DataError(f"the server does not tell the length of {url}, so that a cut would go unnoticed. Copy it.")
    # One field only: a listing and a question for one file write the same time differently.
    told = next((info[field] for field in STATE_FIELDS if info.get(field)), "")
    digest = hashlib.blake2b(f"{size} {told}".encode(), digest_size=8).digest()
    return State(size, int.from_bytes(digest, "little", signed=True), info.get("partial", True))


def contents(url: str, retry: Retry = RETRY) -> bytes:
    """A small file as a whole."""
    return retry.persist(url, lambda: file_system(url).cat_file(url))


def manifest(folder: str, retry: Retry = RETRY) -> dict[str, Any]:
    """manifest.json in a folder, as `data.pack` writes it; {} where there is none."""
    url = f"{folder.rstrip('/')}/manifest.json"
    try:
        found = json.loads(contents(url, retry))
    except Missing:
        return {}
    except ValueError as error:
        raise DataError(f"{url} is not JSON ({error}). Restore it or remove it.") from None
    return found if isinstance(found, dict) else {}


def download(url: str, path: str) -> None:
    """A copy of a file, in one attempt, as `state_now`."""
    file_system(url).get_file(url, path)


def part(url: str, offset: int, size: int, retry: Retry = RETRY) -> bytes:
    """Some bytes of a file, without the rest. NoRanges: the server would send it as a whole."""

    def fetch() -> bytes:
        # With a length given nobody asks the server for it.
        with file_system(url).open(url, "rb", cache_type="none", size=offset + size) as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise OSError(f"{len(data)} of {size} bytes arrived")
        return data

    try:
        return retry.persist(url, fetch)
    except ValueError:  # fsspec's word for an answer that begins elsewhere than was asked for
        raise NoRanges(url) from None


class Ranges:
    """Bytes of a file by position, read ahead: after a short step forward by more, after a jump by little.

    So the headers of small members come many to a request, and the contents of large members are not read at all.
    """

    def __init__(self, url: str, state: State, retry: Retry = RETRY):
        self.url, self.total, self.retry = url, state.bytes, retry
        if not state.ranges:
            raise NoRanges(url)
        self.start, self.data, self.ahead = 0, b"", SHORTEST

    def pread(self, size: int, offset: int) -> bytes:
        """As `os.pread`, with the arguments in its order. NoRanges: the server would send the whole file."""
        size = max(0, min(size, self.total - offset))
        end = self.start + len(self.data)
        if not self.start <= offset <= offset + size <= end:
            step = offset - end
            self.ahead = min(2 * self.ahead, LONGEST) if -size <= step <= NEAR else SHORTEST
            length = min(max(size, self.ahead), self.total - offset)
            self.start, self.data = offset, part(self.url, offset, length, self.retry)
        return self.data[offset - self.start : offset - self.start + size]
