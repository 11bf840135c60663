"""File systems for URLs (fsspec), and retries with exponential backoff."""

import errno
import os
import pkgutil
import random
import time
from collections.abc import Callable, Iterator
from http.client import IncompleteRead
from importlib.util import find_spec
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import fsspec

from data.errors import DataError
from data.storage.credentials import hide

Result = TypeVar("Result")


class Protocol(NamedTuple):
    package: str  # that fsspec imports
    install: str  # argument of pip install
    errors: tuple[str, ...]  # that the package raises besides OSError


HTTP = Protocol("aiohttp", "fsspec[http]", ("aiohttp.ClientError",))
PROTOCOLS = {
    "http": HTTP,
    "https": HTTP,
    "s3": Protocol("s3fs", "s3fs", ("botocore.exceptions.BotoCoreError", "aiohttp.ClientError")),
    "gs": Protocol(
        "gcsfs", "gcsfs", ("gcsfs.retry.HttpError", "aiohttp.ClientError", "google.auth.exceptions.GoogleAuthError")
    ),
    # Its versions use different HTTP clients; errors of those that are not installed are skipped.
    "hf": Protocol("huggingface_hub", "huggingface_hub", ("httpx.HTTPError", "httpx2.HTTPError")),
}
SILENCE_SECONDS = 60  # after which a connection without a byte counts as dropped
RETRY_STATUSES = (408, 425, 429)  # HTTP statuses below 500 that are worth another attempt
DISK_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class Retry(NamedTuple):
    """Exponential backoff with jitter: waits up to first, 2·first, 4·first … seconds between attempts."""

    attempts: int = 7
    first: float = 1.0
    longest: float = 30.0

    def persist(self, url: str, action: Callable[[], Result]) -> Result:
        """Returns what `action` returns; repeats it after transient errors. Raises DataError if it fails for good."""
        started, last = time.monotonic(), ""
        for attempt in range(self.attempts):
            if attempt:
                # Without jitter all workers would come back to a busy server at the same moment.
                time.sleep(random.uniform(0.5, 1) * min(self.longest, self.first * 2 ** (attempt - 1)))
            try:
                return action()
            except _errors(url) as error:
                _raise_if_final(url, error)
                last = _reason(error)
        raise DataError(
            f"{url} cannot be read after {self.attempts} attempts in {time.monotonic() - started:.0f} seconds "
            f"({last}). Check the network and the server, then start again."
        )


class Missing(DataError):
    """Nothing exists at a URL, or these credentials may not see it."""


def is_remote(path: str) -> bool:
    return "://" in path and not path.startswith(("pipe:", "file:"))


def split_path(path: str) -> tuple[str, str]:
    """Returns (folder, name) of a file. Drops the query of a web address: a signature in it may change."""
    if path.startswith(("http://", "https://")):
        path = urlsplit(path)._replace(query="", fragment="").geturl()
    return os.path.split(path)


def file_system(url: str) -> Any:
    """Returns fsspec's file system for a URL. Raises DataError if the protocol is unknown or its package is missing.

    Call it for each use: fsspec caches one per process, and replaces one copied by a fork, whose event loop runs in the
    parent only.
    """
    name = url.partition("://")[0]
    if name not in PROTOCOLS:
        raise DataError(f"{url} has the unknown protocol {name}. Use a local path or one of {', '.join(PROTOCOLS)}.")
    protocol = PROTOCOLS[name]
    if find_spec(protocol.package) is None:
        raise DataError(
            f"{url} needs the package {protocol.package}, which is not installed. "
            f"Install it with `pip install '{protocol.install}'`."
        )
    if protocol is not HTTP:
        return fsspec.filesystem(name)
    import aiohttp  # here, because importing it takes a while

    # By default aiohttp ends any download after five minutes.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS)
    return fsspec.filesystem(name, client_kwargs={"timeout": timeout, "trust_env": True})


def _errors(url: str) -> tuple[type[BaseException], ...]:
    protocol = PROTOCOLS.get(url.partition("://")[0])
    names = [name for name in protocol.errors if find_spec(name.partition(".")[0])] if protocol else []
    return OSError, IncompleteRead, *(pkgutil.resolve_name(name) for name in names)


def _chain(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _status(error: BaseException) -> int | None:
    """Returns the HTTP status behind an error of aiohttp, gcsfs, huggingface_hub or botocore, None if there is none."""
    for cause in _chain(error):
        response = getattr(cause, "response", None)
        told = response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None
        for holder, name in ((cause, "status"), (response, "status_code")):
            told = told or getattr(holder, name, None)
        if type(cause).__module__.startswith("gcsfs"):  # In aiohttp's errors `code` may be something else.
            told = told or getattr(cause, "code", None)
        if isinstance(told, int):
            return told
    return None


def _raise_if_final(url: str, error: BaseException) -> None:
    """Raises DataError if another attempt would fail in the same way."""
    status = _status(error)
    root = list(_chain(error))[-1]  # fsspec reports any failure of a request for a web file's length as "not found".
    if status in (404, 410) or (status is None and isinstance(root, FileNotFoundError)):
        raise Missing(f"{url} does not exist. Check its spelling, and the manifest or list that names it.") from None
    if status in (401, 403) or (status is None and isinstance(root, PermissionError)) or "Credentials" in repr(root):
        raise Missing(
            f"{url} may not be read ({_reason(error)}). Check the credentials: docs/data-remote.md says where they "
            "are looked for."
        ) from None
    if status is not None and status < 500 and status not in RETRY_STATUSES:
        raise DataError(f"{url} cannot be read: the server refuses the request ({_reason(error)}).") from None
    if isinstance(error, OSError) and error.errno in DISK_ERRNOS:
        raise DataError(
            f"{url} cannot be kept: {error.strerror}. Set data.cache to a folder with more room, or "
            "lower data.cache_gb."
        ) from None


def _reason(error: BaseException) -> str:
    root = list(_chain(error))[-1] if isinstance(error, FileNotFoundError) else error
    return hide(" ".join(str(root).split()))[:300].rstrip(".") or type(root).__name__
