"""HTTP server of the page: a socket, who may ask, a content security policy, uploads.

A request is refused if its Host is a foreign name (DNS rebinding: a page of the web whose name was made to mean this
machine), if a page of another site or port sent it, or if it is larger than MAX_UPLOAD. A proxy before the page may
leave the prefix of its address in the paths, or strip it.
"""

import os
import signal
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from importlib.resources import files
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import gradio as gr
import uvicorn
from fastapi import FastAPI

from mae.errors import ConfigError

# The browser fetches nothing from elsewhere. Gradio compiles its templates, which needs unsafe-eval.
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; frame-ancestors "
)
LOOPBACK = ("127.0.0.1", "::1", "localhost")
MAX_UPLOAD = 100 << 20  # bytes of a photograph
REST_OF_UPLOAD = 1 << 16  # bytes around it in the request


class Proxy(NamedTuple):
    """Address of the page behind a proxy; empty without one.

    origin  https://HOST, "" if it follows from the requests
    prefix  of the paths, /user/NAME/proxy/7860
    """

    origin: str = ""
    prefix: str = ""

    @classmethod
    def behind(cls, root_path: str) -> "Proxy":
        """Reads --root-path. Raises ConfigError if it is neither an address nor a path."""
        try:
            scheme, host, prefix, *rest = urlsplit(root_path)
            known = bool(urlsplit(root_path).hostname)
        except ValueError:
            scheme, host, prefix, rest, known = "", "", "", ["?"], False
        if any(rest) or (known and scheme not in ("http", "https")) or (not known and (scheme or host)):
            prefix = "no path"
        if root_path and prefix and not prefix.startswith("/"):
            raise ConfigError(
                f"--root-path {root_path} is no address: give the one that the browser shows, "
                "https://HOST/user/NAME/proxy/7860, or its path /user/NAME/proxy/7860"
            )
        return cls(f"{scheme}://{host.lower()}" if known else "", prefix.rstrip("/"))

    @property
    def names(self) -> set[str]:
        """Returns the name of the host, in lower case, if it is known."""
        return {_name_in(self.origin.partition("://")[2])} if self.origin else set()

    def strip(self, path: str) -> str:
        """Returns the path of a request without the prefix, which some proxies leave there."""
        inside = path == self.prefix or path.startswith(f"{self.prefix}/")
        return (path.removeprefix(self.prefix) or "/") if inside else path


def listen(host: str, port: int) -> socket.socket:
    """Opens a listening socket. Raises ConfigError if host or port cannot be used."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port} is no port: choose one from 1024 to 65535, or 0 for any that is free")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        reason = getattr(error, "strerror", "no name that there can be")
        raise ConfigError(f"--host {host} is no address ({reason}). 127.0.0.1 is this machine alone") from error
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ConfigError(
            f"--host {host} cannot be listened on at --port {port} ({reason}). Choose another --port; 0 is any free one"
        ) from error


def names_of_host(host: str) -> set[str]:
    """Returns the names under which a page is asked for that listens on `host`; addresses are always allowed."""
    if host in LOOPBACK:
        return {"localhost"}
    return {"localhost", host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}


def refuse(scope: dict[str, Any], names: set[str], origin: str = "") -> tuple[int, str] | None:
    """Returns status and reason if a request (ASGI) has to be refused, None if it may be answered.

    origin  of the page behind a proxy
    """
    headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
    asked = _name_in(headers.get("host", ""))
    if not (_is_address(asked) or asked in names):
        way = "open the page by the address of this machine, or start it with --host NAME, behind a proxy --root-path"
        return 403, f"The page does not answer to the name {asked or '(none)'}: {way}."
    if scope["method"] in ("GET", "HEAD", "OPTIONS"):
        return None
    if not _is_own_page(headers, origin):
        return 403, "The page takes nothing from pages of other sites."
    length = headers.get("content-length", "")
    if not length.isdecimal():
        return 411, "The request does not say its length."
    if int(length) > MAX_UPLOAD + REST_OF_UPLOAD:
        return 413, f"The file is too large: at most {MAX_UPLOAD >> 20} MB are taken."
    return None


def _is_own_page(headers: dict[str, str], public: str) -> bool:
    """Returns False if a page of another site or port sent a request; programs that are no browser say nothing."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site")
    if site is None and origin is not None:  # browsers send the site to addresses of https and loopback alone
        return origin.lower() == public or origin.partition("://")[2].lower() == headers.get("host", "").lower()
    return site in (None, "same-origin", "none")


def _name_in(host: str) -> str:
    """Returns a Host header without its port, in lower case; "" if it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def application(page: gr.Blocks, host: str = "127.0.0.1", proxy: Proxy | None = None) -> Callable[..., Awaitable[None]]:
    """Returns the page as an ASGI application without analytics, whose answers carry POLICY.

    host   that it listens on: names other than this and that of the proxy are refused, see `refuse`
    proxy  whose site, a notebook's for one, may then show the page in a frame
    """
    proxy = proxy or Proxy()
    names = names_of_host(host) | proxy.names
    frames = "'self'" if any(proxy) else "'none'"
    system = ["system-ui", "sans-serif"]
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None),
        page,
        path="/",
        root_path=proxy.origin + proxy.prefix or None,
        footer_links=[],
        run_history=False,
        max_file_size=MAX_UPLOAD,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        theme=gr.themes.Default(primary_hue="blue", font=system, font_mono=["ui-monospace", "monospace"]),
        css=files("mae.demo").joinpath("page.css").read_text(),
    )

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (refused := refuse(scope, names, proxy.origin)):
            status, reason = refused
            about = {"content-type": "text/plain", "content-length": str(len(reason)), "connection": "close"}
            headers = [(name.encode(), value.encode()) for name, value in about.items()]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": reason.encode("ascii", "replace")})
        elif scope["type"] == "http":
            path = proxy.strip(scope["path"])
            await with_policy({**scope, "path": path, "raw_path": quote(path).encode()}, receive, send)
        else:
            await app(scope, receive, send)

    async def with_policy(scope: Any, receive: Any, send: Any) -> None:
        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", f"{POLICY}{frames}".encode())
                message["headers"] = [*message.get("headers", []), policy]
            await send(message)

        await app(scope, receive, answer)

    return guarded


def build_server(page: gr.Blocks, host: str = "127.0.0.1", proxy: Proxy | None = None) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(application(page, host, proxy), ws="none", log_level="warning"))


def serve(page: gr.Blocks, at: socket.socket, host: str, proxy: Proxy) -> None:
    """Serves the page until SIGINT or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises the signal again after closing
    with suppress(KeyboardInterrupt):
        build_server(page, host, proxy).run(sockets=[at])


def discard(file: str) -> None:
    """Removes an upload that has been read."""
    if (folder := os.environ.get("GRADIO_TEMP_DIR")) and Path(file).is_relative_to(folder):
        Path(file).unlink(missing_ok=True)
