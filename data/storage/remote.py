"""Remote files: their state, range requests with read-ahead, whole downloads."""

import hashlib
from typing import NamedTuple

from data.errors import DataError
from data.storage.credentials import reveal
from data.storage.protocols import Retry, file_system

RETRY = Retry()
STATE_FIELDS = ("ETag", "etag", "md5Hash", "blob_id", "Last-Modified", "LastModified", "last_modified", "updated")
MIN_REQUEST, MAX_REQUEST = 1 << 16, 1 << 22  # bytes
MAX_GAP = 1 << 18  # bytes; reading over a gap of this length costs less than another request


class NoRanges(Exception):
    """Raised if the server sends whole files only."""


class State(NamedTuple):
    """State of a remote file: the same stamp means the same contents."""

    bytes: int
    stamp: int  # int64 hash of the length and of the ETag, checksum or time that the server gives
    ranges: bool  # whether the server claims to answer range requests


def state(url: str, retry: Retry = RETRY) -> State:
    """Returns the state of a file. Raises DataError if it is missing, not readable, or of unknown length."""
    return retry.persist(url, lambda: state_now(url))


def state_now(url: str) -> State:
    """Does what `state` does in one attempt, for use inside `Retry.persist`: errors of the file system pass through."""
    info = file_system(url).info(reveal(url))
    size = info.get("size")
    if info.get("type") == "directory":
        raise DataError(f"{url} is a folder. Name the shards in it, or end it in a slash to take all of them.")
    if size is None:
        raise DataError(f"the server does not tell the length of {url}, so that a cut would go unnoticed. Copy it.")
    # One field only, because a listing and a query of one file format the same time differently.
    told = next((info[field] for field in STATE_FIELDS if info.get(field)), "")
    digest = hashlib.blake2b(f"{size} {told}".encode(), digest_size=8).digest()
    return State(size, int.from_bytes(digest, "little", signed=True), info.get("partial", True))


def contents(url: str, retry: Retry = RETRY) -> bytes:
    """Returns all bytes of a small file."""
    return retry.persist(url, lambda: file_system(url).cat_file(reveal(url)))


def read_range(url: str, offset: int, size: int, retry: Retry = RETRY) -> bytes:
    """Requests `size` bytes from `offset` on. Raises NoRanges if the server would send the whole file."""

    def fetch() -> bytes:
        # With a given length fsspec does not ask the server for it.
        with file_system(url).open(reveal(url), "rb", cache_type="none", size=offset + size) as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise OSError(f"{len(data)} of {size} bytes arrived")
        return data

    try:
        return retry.persist(url, fetch)
    except ValueError:  # fsspec raises it if the response is not the range that was requested.
        raise NoRanges(url) from None


class Ranges:
    """Positional reads with adaptive read-ahead: doubled after each short step forward, minimal after a jump.

    One request then fetches the headers of many small members, and the contents of large members are not read.
    """

    def __init__(self, url: str, state: State, retry: Retry = RETRY):
        self.url, self.total, self.retry = url, state.bytes, retry
        if not state.ranges:
            raise NoRanges(url)
        self.start, self.data, self.ahead = 0, b"", MIN_REQUEST

    def pread(self, size: int, offset: int) -> bytes:
        """Returns the bytes as `os.pread` does. Raises NoRanges if the server would send the whole file."""
        size = max(0, min(size, self.total - offset))
        end = self.start + len(self.data)
        if not self.start <= offset <= offset + size <= end:
            step = offset - end
            self.ahead = min(2 * self.ahead, MAX_REQUEST) if -size <= step <= MAX_GAP else MIN_REQUEST
            length = min(max(size, self.ahead), self.total - offset)
            self.start, self.data = offset, read_range(self.url, offset, length, self.retry)
        return self.data[offset - self.start : offset - self.start + size]
