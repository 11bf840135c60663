"""HTTP server of the page: a socket, a content security policy, a private folder for uploads."""

import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.resources import files
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

from mae.errors import ConfigError

# The browser fetches nothing from elsewhere. Gradio compiles its templates, which needs unsafe-eval.
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'"
)


def listen(host: str, port: int) -> socket.socket:
    """Opens a listening socket. Raises ConfigError if host or port cannot be used."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port {port} is no port: choose one from 1024 to 65535, or 0 for any that is free")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ConfigError(f"--host {host} is no address ({error.strerror}). 127.0.0.1 is this machine alone") from error
    try:
        return socket.create_server(address[:2], family=family)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ConfigError(
            f"--host {host} cannot be listened on at --port {port} ({reason}). Choose another --port; 0 is any free one"
        ) from error


def application(page: gr.Blocks) -> Callable[..., Awaitable[None]]:
    """Returns the page as an ASGI application without analytics, whose answers carry POLICY."""
    system = ["system-ui", "sans-serif"]
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None),
        page,
        path="/",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        theme=gr.themes.Default(primary_hue="blue", font=system, font_mono=["ui-monospace", "monospace"]),
        css=files("mae.demo").joinpath("page.css").read_text(),
    )

    async def with_policy(scope: Any, receive: Any, send: Any) -> None:
        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start":
                policy = (b"content-security-policy", POLICY.encode())
                message["headers"] = [*message.get("headers", []), policy]
            await send(message)

        await app(scope, receive, answer)

    return with_policy


def build_server(page: gr.Blocks) -> uvicorn.Server:
    return uvicorn.Server(uvicorn.Config(application(page), log_level="warning"))


def serve(page: gr.Blocks, at: socket.socket) -> None:
    """Serves the page until SIGINT or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises the signal again after closing
    with suppress(KeyboardInterrupt):
        build_server(page).run(sockets=[at])


@contextmanager
def private_uploads() -> Iterator[None]:
    """Keeps uploads to pages made inside this context in a temporary folder, removed at its end."""
    with TemporaryDirectory(prefix="mae-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        yield
        del os.environ["GRADIO_TEMP_DIR"]
