"""Credentials in URLs: hidden wherever a URL is kept or shown, put back only where it is opened.

    http://user:password@host/a.tar?X-Amz-Signature=5f3c…  →  http://hidden@host/a.tar?X-Amz-Signature=hidden

Command lines, settings, indexes, run folders, trackers and messages hold the second form. A credential is put back for
the host alone that it was given for. Programs that this one starts find them in the environment.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from data.errors import DataError

PASSED_ON = "MAE_CREDENTIALS"
LONGEST_VARIABLE = 1 << 17  # bytes; Linux starts no program with a longer one

HIDDEN = re.compile(r"hidden\d*")
NEXT = r"(?:,|::)[a-z][a-z0-9+.-]*://"  # in a list or a chain of URLs
END = rf"[\])}}]*(?:$|[\s#'\"<>]|{NEXT})"  # brackets around a URL are not its own
# A name with a domain or a port, and no file at the end of a path.
KNOWN_HOST = (r"@(?:localhost|[\w-]+(?:\.[\w-]+)*(?:\.(?!(?:tar|tgz|gz|zst|zip|json|csv|txt|npy)\b)[a-z]{2,}|(?=:\d)))"
              r"(?::\d+)?(?=[/?#\s'\"<>,\])}]|$)")  # fmt: skip
PLAIN = r"[^\s/?#'\"<>]*"
# A password that is not escaped may hold what ends a host (/?#), which a port in that place does not.
OPEN = rf"(?<!file://)(?!arn:)[^\s/?#'\"<>@:\[]*:(?!\d+[/?#])(?:(?!{NEXT}|://)[^\s'\"<>])*"
# The first @ before a host that can be told, else the last one before a path, else the last one.
USER = rf"{PLAIN}(?={KNOWN_HOST})|{OPEN}?(?={KNOWN_HOST})|{PLAIN}(?=@)|{OPEN}(?=@[^\s/?#'\"<>@]+/)|{OPEN}(?=@)"
URL = re.compile(rf"(?P<scheme>[a-z][a-z0-9+.-]*)://(?:(?P<user>{USER})@)?(?P<host>(?:(?!{NEXT})[^\s/?#'\"<>,])*)"
                 rf"(?P<path>(?:(?!{NEXT})[^\s?#'\"<>])*)(?:\?(?P<query>(?:(?!{END})[^\s#'\"<>])*))?",
                 re.IGNORECASE)  # fmt: skip

_secrets: defaultdict[str, dict[str, str]] = defaultdict(dict)  # host -> {what stands for a secret: the secret}
_names: defaultdict[str, dict[str, str]] = defaultdict(dict)  # host -> {secret: what stands for it}


def hide(text: str) -> str:
    """Returns a text with the user information and the values of the queries of its URLs hidden; remembers them."""
    return URL.sub(lambda url: _replace(url, _hide), text) if "://" in text else text


def hide_all(settings: Any) -> Any:
    """Hides the credentials in all texts of nested dictionaries and lists."""
    return _change_all(settings, hide)


def reveal(text: str) -> str:
    """Returns a text as it was before `hide`, passwords escaped.

    Raises DataError if this process was never given the credential.
    """
    return URL.sub(lambda url: _replace(url, _reveal), text) if "://" in text else text


def reveal_all(settings: Any) -> Any:
    """Puts the credentials back in all texts of nested dictionaries and lists."""
    return _change_all(settings, reveal)


def pass_on() -> None:
    """Puts the credentials that are known by now into the environment of the programs that this one starts."""
    text = json.dumps(_secrets)
    if _secrets and len(text) < LONGEST_VARIABLE:
        os.environ[PASSED_ON] = text


def _take_over() -> None:
    for host, secrets in json.loads(os.environ.get(PASSED_ON, "{}")).items():
        _secrets[host] |= secrets
        _names[host] |= {secret: name for name, secret in secrets.items()}


def _change_all(settings: Any, change: Callable[[str], str]) -> Any:
    if isinstance(settings, dict):
        return {name: _change_all(value, change) for name, value in settings.items()}
    if isinstance(settings, list | tuple):
        return [_change_all(value, change) for value in settings]
    return change(settings) if isinstance(settings, str) else settings


def _replace(url: re.Match[str], change: Any) -> str:
    host, query = url["host"].lower(), url["query"]
    user = "" if url["user"] is None else f"{change(host, _escape(url['user']), url[0])}@"
    pairs = []
    for pair in (query or "").split("&"):
        name, equals, value = pair.partition("=")
        if equals or url["scheme"].lower() in ("http", "https"):  # else a question mark may be part of a name
            pair = f"{name}={change(host, value, url[0])}" if equals else change(host, name, url[0])
        pairs.append(pair)
    return f"{url['scheme']}://{user}{url['host']}{url['path']}" + ("" if query is None else f"?{'&'.join(pairs)}")


def _escape(user: str) -> str:
    """Escapes the letters of a password that would end it, without which nothing could open the URL."""
    return re.sub("[/?#@]", lambda letter: f"%{ord(letter[0]):02X}", user)


def _hide(host: str, secret: str, _: str) -> str:
    if not secret or HIDDEN.fullmatch(secret):
        return secret
    if secret not in _names[host]:
        number = len(_names[host]) + 1
        name = "hidden" if number == 1 else f"hidden{number}"
        _names[host][secret], _secrets[host][name] = name, secret
    return _names[host][secret]


def _reveal(host: str, name: str, url: str) -> str:
    if not HIDDEN.fullmatch(name):
        return name
    if name not in _secrets[host]:
        raise DataError(
            f"{url} lacks the credential that is hidden in it: run folders and messages keep none. Give the whole URL "
            "again, as data.path= (and data.val_path=)."
        )
    return _secrets[host][name]


_take_over()
