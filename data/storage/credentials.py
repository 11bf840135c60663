"""Credentials in URLs: hidden wherever a URL is kept or shown, put back only where it is opened.

    http://user:password@host/a.tar?X-Amz-Signature=5f3c…  →  http://hidden@host/a.tar?X-Amz-Signature=hidden

Settings, indexes, run folders, trackers and messages hold the second form. A credential is put back for the host alone
that it was given for.
"""

import re
from collections import Counter
from typing import Any

from data.errors import DataError

HIDDEN = re.compile(r"hidden\d*")
URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?:(?P<user>[^\s/?#'\"<>]*)@)?(?P<host>[^\s/?#'\"<>,]*)"
                 r"(?P<path>[^\s?#'\"<>]*)(?:\?(?P<query>[^\s#'\"<>]*))?", re.IGNORECASE)  # fmt: skip

_secrets: dict[tuple[str, str], str] = {}  # (host, what stands for it) -> secret
_names: dict[tuple[str, str], str] = {}  # (host, secret) -> what stands for it
_counts: Counter[str] = Counter()  # secrets of each host


def hide(text: str) -> str:
    """Returns a text with the user information and the values of the queries of its URLs hidden; remembers them."""
    return URL.sub(lambda url: _replace(url, _hide), text) if "://" in text else text


def hide_all(settings: Any) -> Any:
    """Hides the credentials in all texts of nested dictionaries and lists."""
    if isinstance(settings, dict):
        return {name: hide_all(value) for name, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [hide_all(value) for value in settings]
    return hide(settings) if isinstance(settings, str) else settings


def reveal(text: str) -> str:
    """Returns a text as it was before `hide`. Raises DataError if this process was never given the credential."""
    return URL.sub(lambda url: _replace(url, _reveal), text) if "://" in text else text


def _replace(url: re.Match[str], change: Any) -> str:
    host, query = url["host"].lower(), url["query"]
    user = "" if url["user"] is None else f"{change(host, url['user'], url[0])}@"
    pairs = []
    for pair in (query or "").split("&"):
        name, equals, value = pair.partition("=")
        if equals or url["scheme"].lower() in ("http", "https"):  # else a question mark may be part of a name
            pair = f"{name}={change(host, value, url[0])}" if equals else change(host, name, url[0])
        pairs.append(pair)
    return f"{url['scheme']}://{user}{url['host']}{url['path']}" + ("" if query is None else f"?{'&'.join(pairs)}")


def _hide(host: str, secret: str, _: str) -> str:
    if not secret or HIDDEN.fullmatch(secret):
        return secret
    if (host, secret) not in _names:
        number = _counts[host] = _counts[host] + 1
        name = "hidden" if number == 1 else f"hidden{number}"
        _names[host, secret], _secrets[host, name] = name, secret
    return _names[host, secret]


def _reveal(host: str, name: str, url: str) -> str:
    if not HIDDEN.fullmatch(name):
        return name
    if (host, name) not in _secrets:
        raise DataError(
            f"{url} lacks the credential that is hidden in it: run folders and messages keep none. Give the whole URL "
            "again, as data.path= (and data.val_path=)."
        )
    return _secrets[host, name]
