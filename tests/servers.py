"""Real servers on loopback: files over HTTP from a server with faults, and S3."""

import base64
import contextlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = Callable[[str, str, int], str | None]  # method, path, number of the request for it -> what goes wrong


class FileServer(ThreadingHTTPServer):
    """The files of a folder, without listings.

    ranges  whether parts are sent
    fault   "drop" closes the connection, "truncate" sends half of the body, "corrupt" other bytes, a number that status
    credentials  user:password, and what the query has to contain; others get 403
    asked   how often (method, path) was asked for; sent: the bytes of all bodies
    """

    daemon_threads = True

    def __init__(
        self,
        folder: Path,
        *,
        ranges: bool = True,
        fault: Fault | None = None,
        credentials: tuple[str, str] | None = None,
    ):
        super().__init__(("127.0.0.1", 0), Handler)
        self.credentials = credentials
        self.folder, self.ranges, self.fault = folder, ranges, fault or (lambda method, path, number: None)
        self.asked: Counter[tuple[str, str]] = Counter()
        self.sent = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        pass  # A client that has heard enough closes the connection.

    def downloads(self) -> dict[str, int]:
        return {path: number for (method, path), number in self.asked.items() if method == "GET" and ".tar" in path}


class Handler(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_GET(self) -> None:
        self.answer("GET")

    def answer(self, method: str) -> None:
        server, path = self.server, self.path.partition("?")[0]
        with server.lock:
            server.asked[method, path] += 1
            fault = server.fault(method, path, server.asked[method, path])
        if fault == "drop":
            self.close_connection = True
            return
        if server.credentials and not self.may_read(*server.credentials):
            self.reply(403, b"", method)
            return
        file = server.folder / path.strip("/")
        if (fault and fault.isdigit()) or not file.is_file():
            self.reply(int(fault) if fault and fault.isdigit() else 404, b"", method)
            return
        body, status, headers = file.read_bytes(), 200, {"ETag": f'"{file.stat().st_mtime_ns}"'}
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")) if server.ranges else None
        if found:
            start, stop = int(found[1]), min(int(found[2] or len(body)) + 1, len(body))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
            body, status = body[start:stop], 206
        if fault == "corrupt":
            body = bytes(len(body))
        self.reply(status, body, method, headers, cut=fault == "truncate")

    def may_read(self, user: str, query: str) -> bool:
        given = self.headers.get("Authorization", "").removeprefix("Basic ")
        return given == base64.b64encode(user.encode()).decode() and query in self.path

    def reply(self, status: int, body: bytes, method: str, headers: dict[str, str] | None = None, cut=False) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if method == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
            with self.server.lock:
                self.server.sent += len(body)
        self.close_connection = self.close_connection or cut

    def log_message(self, format: str, *args) -> None:
        pass


@contextlib.contextmanager
def serving(folder: Path, **options) -> Iterator[FileServer]:
    with FileServer(folder, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            server.fault = lambda *request: "drop"  # Connections that are kept alive would go on.
            thread.join()
