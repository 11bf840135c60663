"""A W&B server on loopback, as far as `wandb sync` and a run that is online ask: it keeps the rows that it is sent."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "0" * 40


class WandbServer(ThreadingHTTPServer):
    """runs[id][file] holds the lines of a file of a run, put where the sender says."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: dict[str, dict[str, list[str]]] = {}
        self.lock = threading.Lock()

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.server_port}", "WANDB_API_KEY": KEY}

    def handle_error(self, request, client_address) -> None:
        pass  # A client that has heard enough closes the connection.

    def rows(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.runs[run]["wandb-history.jsonl"]]

    def keep(self, run: str, files: dict[str, Any]) -> None:
        with self.lock:
            for name, part in files.items():
                lines = self.runs.setdefault(run, {}).setdefault(name, [])
                lines[part["offset"] : part["offset"] + len(part["content"])] = part["content"]

    def answer(self, query: str, given: dict[str, Any]) -> dict[str, Any]:
        """To a GraphQL query; what is not known here is an error, as from an old server."""
        if "query Viewer" in query:
            return {"data": {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}"}}}
        if "mutation UpsertBucket" in query:
            project = {"id": "1", "name": given["project"], "entity": {"id": "1", "name": "me"}}
            bucket = {"id": "1", "name": given["name"], "displayName": given["displayName"], "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "query RunResumeStatus" in query:
            return {"data": {"model": self.model(given) if given["name"] in self.runs else None}}
        return {"errors": [{"message": "not known here"}]}

    def model(self, given: dict[str, Any]) -> dict[str, Any]:
        """What is there of a run that is to go on."""
        files = self.runs[given["name"]]
        count = {key: len(files.get(file, [])) for key, file in FILES.items()}
        bucket = {
            "id": "1",
            "name": given["name"],
            "config": "{}",
            "tags": [],
            "wandbConfig": '{"t": 1}',
            "summaryMetrics": files.get("wandb-summary.json", ["{}"])[-1],
            "historyTail": json.dumps(files.get("wandb-history.jsonl", [])[-1:]),
            "eventsTail": json.dumps(files.get("wandb-events.jsonl", [])[-1:]),
            **{f"{key}LineCount": number for key, number in count.items()},
        }
        return {"id": "1", "name": given["project"], "entity": {"id": "1", "name": "me"}, "bucket": bucket}


FILES = {"history": "wandb-history.jsonl", "events": "wandb-events.jsonl", "log": "output.log"}


class Handler(BaseHTTPRequestHandler):
    server: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if self.path.endswith("/graphql"):
            question = json.loads(body)
            answer = self.server.answer(question["query"], question.get("variables") or {})
        elif self.path.endswith("/file_stream"):
            self.server.keep(self.path.split("/")[-2], json.loads(body).get("files") or {})
        contents = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(contents)))
        self.end_headers()
        self.wfile.write(contents)
