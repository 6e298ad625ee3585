"""An HTTP server that answers like a gateway, as far as the command line asks."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STATUS: dict[str, Any] = {
    "schema": 1,
    "state": "SERVING",
    "generation": 1,
    "placement_epoch": 1,
    "error": None,
    "model": {"name": "demo", "model_type": "olmoe", "dtype": "bfloat16", "max_model_len": 4096},
    "workers": [
        {
            "name": "attention-0",
            "role": "attention",
            "rank": 0,
            "node": "here",
            "pid": 11,
            "state": "SERVING",
            "threads": 2,
            "kv_blocks_free": 10,
            "kv_blocks_total": 12,
        },
        {
            "name": "expert-0",
            "role": "expert",
            "rank": 0,
            "node": "here",
            "pid": 12,
            "state": "SERVING",
            "threads": None,
            "slots": 32,
        },
    ],
    "gateway": [],
    "history": [],
}
EVENTS: dict[str, Any] = {
    "schema": 1,
    "events": [
        {"generation": 1, "time": 1e9, "cause": "start", "effect": "serve with 2 workers"},
        {"generation": 2, "time": 1e9 + 5, "cause": "lost expert-1: killed", "effect": "go on"},
    ],
}
PLACEMENT: dict[str, Any] = {
    "schema": 1,
    "epoch": 1,
    "banks": [
        {
            "bank": "mlp",
            "layer": layer,
            "physical_to_logical": [[0, 1, -1], [2, 3, 0]],
            "load": [20, 1, 0, 40],
        }
        for layer in (0, 1)
    ],
}
_BOTH = {"predicted": 0.9, "achieved": 0.8}
LOAD: dict[str, Any] = {
    "schema": 1,
    "model": "demo",
    "top_k": 2,
    "tokens": 5,
    "epoch": 1,
    "window_tokens": 2,
    "average_tokens": 0,
    "balancedness": _BOTH,
    "phases": {"prefill": _BOTH, "decode": {"predicted": 0.9, "achieved": None}},
    "workers": ["expert-0"],
    "banks": [
        {
            "bank": "mlp",
            "layer": layer,
            "counts": [1, 2, 3, 4],
            "window": [0, 0, 1, 3],
            "average": None,
            "balancedness": _BOTH,
            "phases": {"prefill": _BOTH, "decode": {"predicted": 0.9, "achieved": None}},
        }
        for layer in (0, 1)
    ],
}


PARTIAL = {
    "schema": 1,
    "state": "SERVING",
    "is_partial": True,
    "workers": [{"name": "expert-0", "role": "expert", "rank": 0, "state": "SERVING", "slots": 4}],
    "gateway": [{"name": "gateway-1", "grpc_port": 50051}],
}
"""The status for a client's key."""


def _nothing() -> None:
    pass


@dataclass(slots=True)
class FakeGateway:
    """What to answer; tests change it while the server runs."""

    url: str = ""
    ready: tuple[int, Any] = (200, {"ready": True})
    status: tuple[int, Any] = (200, STATUS)
    events: list[Any] = field(default_factory=list)
    delay_s: float = 0.0
    before_answer: Callable[[], None] = _nothing
    """Called before an answer to POST begins."""
    before_end: Callable[[], None] = _nothing
    """Called before the last event of an answer."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    admin: list[tuple[int, Any]] = field(default_factory=list)
    admin_paths: list[str] = field(default_factory=list)
    """What was asked for below ``/admin``."""
    paths: list[str] = field(default_factory=list)
    """What was asked for anywhere, with its query."""
    documents: dict[str, Any] = field(default_factory=dict)
    """Answers to POST, by path, and after a space the revision that a request names; other paths
    are answered by ``events``."""
    document_status: int = 200
    """HTTP status of the answers in ``documents``."""
    metrics: list[str] = field(default_factory=list)
    """Expositions, the next at each scrape, the last again and again."""
    keys: list[str | None] = field(default_factory=list)
    operator_key: str = ""
    """If set, other keys are shown what those of clients are."""

    def open_admin(self) -> None:
        """Say in the status that the admin port is this server's."""
        entry = {"name": "gateway-1", "admin_http": self.url.removeprefix("http://")}
        self.status = (200, {**STATUS, "gateway": [entry]})

    def answer(self, path: str) -> tuple[int, Any]:
        """Status and document of a path; below ``/admin`` the next of ``admin``."""
        if path.startswith("/admin/"):
            self.admin_paths.append(path)
            return self.admin.pop(0)
        error = {
            "error": {"message": f"no {path}", "type": "x", "param": None, "code": "not_found"}
        }
        if self.operator_key and self.keys[-1] != f"Bearer {self.operator_key}":
            if path in ("/cluster/v1/load", "/cluster/v1/placement"):
                return 403, {"error": {**error["error"], "message": "this needs an admin key"}}
            if path == "/cluster/v1/status":
                return 200, PARTIAL
        routes = {
            "/ready": self.ready,
            "/cluster/v1/status": self.status,
            "/cluster/v1/placement": (200, PLACEMENT),
            "/cluster/v1/events": (200, EVENTS),
            "/cluster/v1/load": (200, LOAD),
        }
        return routes.get(path.partition("?")[0], (404, error))


@contextlib.contextmanager
def fake_gateway() -> Iterator[FakeGateway]:
    """A running one on a free port."""
    gateway = FakeGateway()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            time.sleep(gateway.delay_s)
            gateway.keys.append(self.headers.get("Authorization"))
            gateway.paths.append(self.path)
            if self.path == "/metrics":
                text = gateway.metrics.pop(0) if len(gateway.metrics) > 1 else gateway.metrics[0]
                self._send(200, "text/plain", text.encode())
                return
            status, document = gateway.answer(self.path)
            self._send(status, "application/json", json.dumps(document).encode())

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            gateway.bodies.append(json.loads(self.rfile.read(length)))
            gateway.paths.append(self.path)
            if self.path.startswith("/admin/"):
                status, document = gateway.answer(self.path)
                self._send(status, "application/json", json.dumps(document).encode())
                return
            revision = self.headers.get("x-model-revision", "")
            named = f"{self.path} {revision}".strip()
            if named in gateway.documents:
                body = json.dumps(gateway.documents[named]).encode()
                self._send(gateway.document_status, "application/json", body)
                return
            events = [f"data: {json.dumps(e)}\n\n" for e in gateway.events]
            parts = ("".join([": ping\n\n", *events]).encode(), b"data: [DONE]\n\n")
            gateway.before_answer()
            self._send(200, "text/event-stream", *parts)

        def _send(self, status: int, kind: str, body: bytes, end: bytes = b"") -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body) + len(end)))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(body)
                gateway.before_end()
                self.wfile.write(end)

        def log_message(self, format: str, *args: Any) -> None:
            """Keep the tests' output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    gateway.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield gateway
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
