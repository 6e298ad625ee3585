"""A real server for tests: ``expertmesh serve`` as a process of its own, on free ports.

It serves the bundled checkpoint in float32 with 1 attention and 2 expert workers. When pytest dies,
the server sees it and ends too.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import httpx
import psutil

from benchmarks.harness.serving_cluster import QUIET_S
from benchmarks.harness.stalls import wait_until
from cluster.core.codec import from_plain
from cluster.launch.orphans import end_private_ray, find_by_files
from cluster.launch.state_file import ClusterRecord

START_LIMIT_S = 240.0
"""Longest start, on a machine that is busy with other tests."""
STOP_LIMIT_S = 150.0
"""Longest time until a server has ended after a signal."""
_INTERRUPTED = 130
"""Exit status after SIGINT."""
WAIT_S = 120.0
"""Longest wait for an answer, or for a state."""

OPTIONS = (
    *("--port", "0", "--grpc-port", "0", "--dtype", "float32", "--drain-lead-s", "0"),
    *("--detection-limit-s", f"{QUIET_S:g}"),  # of silence, which a busy machine causes too
    *("--max-queue-wait-s", "0"),  # and it makes requests wait
)
GOOD: Mapping[str, Any] = {
    "prompt": "ROMEO:",
    "max_tokens": 12,
    "temperature": 0,
    "return_token_ids": True,
}
"""A completion that always has the same answer."""

Address = tuple[str, int]


def command(*words: str) -> list[str]:
    """An ``expertmesh`` command line."""
    return [sys.executable, "-m", "cluster.cli.main", *words]


def environment(state_home: Path) -> dict[str, str]:
    """Environment of a command whose state files are in ``state_home``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("EXPERTMESH_", "RAY_"))}
    home = str(state_home.absolute())  # the launcher has another working directory
    return {**kept, "XDG_STATE_HOME": home, "EXPERTMESH_PARENT": str(os.getpid())}


@dataclass(slots=True)
class Served:
    """A server that runs, and its client."""

    http: str
    """URL."""
    grpc: str
    """``host:port``."""
    record: ClusterRecord
    """Its state file."""
    client: httpx.Client = field(init=False)
    """For plain HTTP."""

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.http, timeout=WAIT_S)

    @property
    def folder(self) -> Path:
        """Folder of its private Ray."""
        return Path(self.record.temp_dir)

    @property
    def http_address(self) -> Address:
        """Where a bare socket connects for HTTP."""
        return parse_address(self.http.removeprefix("http://"))

    def complete(self, **fields: Any) -> dict[str, Any]:
        """The answer of a completion that must succeed."""
        response = self.client.post("/v1/completions", json=fields)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def status(self) -> dict[str, Any]:
        """``/cluster/v1/status``."""
        response = self.client.get("/cluster/v1/status")
        assert response.status_code == 200, response.text
        status: dict[str, Any] = response.json()
        return status

    def engine(self) -> dict[str, float]:
        """Gauges and counters of the one attention worker."""
        worker: dict[str, Any] = {}

        def has_told() -> bool:  # a busy one may miss the time for its first answer
            (found,) = [w for w in self.status()["workers"] if w["role"] == "attention"]
            worker.update(found)
            return bool(found["stats"])

        wait_until(has_told, "the numbers of the attention worker")
        assert worker["kv_blocks_free"] == worker["stats"]["kv_blocks_free"]
        stats: dict[str, float] = worker["stats"]
        return stats

    def wait_engine(self, name: str, at_least: float) -> dict[str, float]:
        """Wait until a number of the engine has grown so far."""
        wait_until(lambda: self.engine()[name] >= at_least, f"{name} to come to {at_least}")
        return self.engine()

    def wait_idle(self) -> dict[str, float]:
        """Wait until nothing runs or waits and all KV blocks are free; the engine's numbers."""
        wait_until(lambda: _is_idle(self.engine()), "an idle engine")
        return self.engine()

    def listeners(self) -> dict[str, Address]:
        """Every port that a process of ours listens on, but for Ray's own."""
        found = {"HTTP": self.http_address, "gRPC": parse_address(self.grpc)}
        for worker in self.status()["workers"]:
            name = worker["name"]
            if worker["engine_address"]:
                found[f"engine stream of {name}"] = parse_address(worker["engine_address"])
            found |= _plain_listeners(f"data plane of {name}", worker["pid"])
        found |= _plain_listeners("control server", self.pid_of("ControllerActor"))
        return found

    def admin(self, method: str, call: str, /, **body: Any) -> httpx.Response:
        """The response of a gateway's admin port, which moves when a gateway is replaced."""
        url = f"http://{self.status()['gateway'][0]['admin_http']}/admin/v1/{call}"
        return httpx.request(method, url, json=body or None, timeout=WAIT_S)

    def pid_of(self, actor_class: str) -> int:
        """Process of the one actor of that class."""
        (pid,) = self.pids_of(actor_class)
        return pid

    def pids_of(self, actor_class: str) -> list[int]:
        """Processes of all actors of that class."""
        pids = [p.pid for p in find_by_files(self.folder)]
        return [p for p in pids if _title(p) == f"ray::{actor_class}"]


def _title(pid: int) -> str:
    """First word of a command line; Ray adds the method that an actor runs."""
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended since
        return "".join(psutil.Process(pid).cmdline()[:1]).partition(".")[0]
    return ""


def parse_address(text: str) -> Address:
    """``host:port`` as sockets take it."""
    host, _, port = text.rpartition(":")
    return host, int(port)


def _is_idle(stats: dict[str, float]) -> bool:
    busy = stats["num_requests_running"] + stats["num_requests_waiting"]
    return stats["kv_blocks_free"] == stats["kv_blocks_total"] and not busy


def _plain_listeners(what: str, pid: int) -> dict[str, Address]:
    """Listeners of a process that our own code opened: bound to IPv4, where Ray's take both."""
    addresses: list[Any] = [
        c.laddr
        for c in psutil.Process(pid).net_connections("tcp")
        if c.status == psutil.CONN_LISTEN and c.family == socket.AF_INET
    ]
    assert addresses, f"process {pid} does not listen"
    return {f"{what} ({a.port})": (a.ip, a.port) for a in addresses}


@contextlib.contextmanager
def running_server(
    state_home: Path,
    *words: str,
    before: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    program: Sequence[str] | None = None,
    cwd: Path | None = None,
    end_by: signal.Signals = signal.SIGTERM,
    start_limit_s: float = START_LIMIT_S,
) -> Iterator[Served]:
    """Serve for the length of a ``with`` block; the end must be clean and leave nothing.

    Args:
        state_home: folder for the state files and the log.
        words: further options of ``serve``.
        before: a command that executes the words after it.
        variables: further variables of the environment.
        program: an installed ``expertmesh`` command; None runs the code of this process.
        cwd: working directory.
        end_by: signal that ends the server.
        start_limit_s: longest start in seconds.
    """
    log = state_home / "stderr"
    with log.open("wb") as errors:
        child = subprocess.Popen(
            [*before, *(program or command()), "serve", *OPTIONS, *words],
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**environment(state_home), **(variables or {})},
        )
    server: Served | None = None
    try:
        assert child.stdout is not None
        line = _first_line(child.stdout, start_limit_s)
        assert line.startswith("expertmesh ready "), log.read_text()
        server = _describe(line, state_home / "expertmesh" / f"serve-{child.pid}.json")
        with server.client:
            yield server
        child.send_signal(end_by)
        assert child.wait(STOP_LIMIT_S) == (_INTERRUPTED if end_by is signal.SIGINT else 0)
        assert not server.folder.exists()
        assert find_by_files(server.folder) == []
    finally:
        child.kill()
        child.communicate()
        if server is not None and server.folder.exists():
            end_private_ray(server.folder, server.record.processes)


def _first_line(stream: IO[bytes], limit_s: float) -> str:
    """The first line of a child's output; empty when it ended, or did not come in time."""
    ready, _, _ = select.select([stream], [], [], limit_s)
    return stream.readline().decode() if ready else ""


def _describe(line: str, state_file: Path) -> Served:
    facts = dict(word.split("=", 1) for word in line.split()[2:])
    record = from_plain(json.loads(state_file.read_text()), ClusterRecord)
    return Served(http=facts["http"], grpc=facts["grpc"], record=record)
