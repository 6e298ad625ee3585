"""The runbook "Blue/green": a cluster of another release takes over, and no request fails.

The first cluster is threads of this process, the second one processes whose metadata names another
release.

What stands for the Service is a forwarder of connections: new ones go to the cluster that is
selected, those that are open stay where they began.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks.harness.cluster_gateway import LIMIT_S, gateway_of
from benchmarks.harness.server import running_server
from benchmarks.harness.serving_cluster import ThreadCluster, serving
from cluster.cli.main import main
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.core.release import RELEASE
from tests.harness.fault_rows import quiet_config
from tests.system.faults.test_drain_command import ports_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

OTHER = "9.9.9"
NUM_CLIENTS = 4
SHORT_TOKENS = 16
LONG_TOKENS = 160


class Service:
    """A port whose connections go to the cluster that is selected."""

    def __init__(self, url: str) -> None:
        self.select(url)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def select(self, url: str) -> None:
        """Lead new connections to the cluster at ``url``."""
        self._target = ("127.0.0.1", int(url.rpartition(":")[2]))

    def close(self) -> None:
        """Take no more connections, and wait for the ends of those that are open."""
        self._listener.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(LIMIT_S)
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self._threads.append(threading.Thread(target=_forward, args=(near, far)))
                self._threads[-1].start()


def _forward(near: socket.socket, far: socket.socket) -> None:
    """Carry a request and its answer; the server ends the connection."""
    with near, far:
        there = threading.Thread(target=_copy, args=(near, far))
        there.start()
        _copy(far, near)
        with suppress(OSError):  # the client has gone
            near.shutdown(socket.SHUT_RDWR)
        there.join(LIMIT_S)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):  # the other direction has ended both
        while data := source.recv(65536):
            target.sendall(data)


def texts(url: str, num_tokens: int) -> Iterator[str]:
    """The pieces of one streamed completion."""
    body = {
        "prompt": "ROMEO:",
        "temperature": 0,
        "ignore_eos": True,
        "max_tokens": num_tokens,
        "stream": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    last = b""
    with urllib.request.urlopen(request, timeout=LIMIT_S) as reply:
        for line in reply:
            last = line.strip() or last
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                yield from (choice["text"] for choice in event["choices"])
    assert last == b"data: [DONE]"


@dataclass(slots=True)
class Clients:
    """Some clients that ask again and again, each time over a new connection."""

    url: str
    answers: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    _added: threading.Condition = field(default_factory=threading.Condition)
    _is_over: threading.Event = field(default_factory=threading.Event)

    def wait_for(self, number: int) -> None:
        """Wait for this number of further answers."""
        with self._added:
            wanted = len(self.answers) + number
            assert self._added.wait_for(lambda: len(self.answers) >= wanted or self.errors, LIMIT_S)

    def _ask(self) -> None:
        while not self._is_over.is_set():
            try:
                answer = "".join(texts(self.url, SHORT_TOKENS))
            except Exception as err:
                self.errors.append(repr(err))
                self._is_over.set()
            else:
                self.answers.append(answer)
            with self._added:
                self._added.notify_all()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """They ask, and come to the end of what they have begun."""
        threads = [threading.Thread(target=self._ask) for _ in range(NUM_CLIENTS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            for thread in threads:
                thread.join(LIMIT_S)


def start_blue(stack: ExitStack) -> str:
    """A cluster of this release with a gateway; the URL of its HTTP port."""
    cluster = stack.enter_context(serving(ThreadCluster(quiet_config(1, 1))))
    gateway = stack.enter_context(gateway_of(cluster))
    url, _ = stack.enter_context(ports_of(gateway))
    return url


def start_green(stack: ExitStack, folder: Path) -> str:
    """A cluster of another release; the URL of its HTTP port."""
    facts = folder / f"expertmesh-{OTHER}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: expertmesh\nVersion: {OTHER}\n")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        return stack.enter_context(running_server(folder, "--deterministic")).http


def release_of(url: str) -> tuple[str, str]:
    """Of a cluster's gateway and of its controller; workers check theirs against both."""
    with urllib.request.urlopen(f"{url}/version", timeout=LIMIT_S) as reply:
        version = json.load(reply)
    with urllib.request.urlopen(f"{url}/cluster/v1/status", timeout=LIMIT_S) as reply:
        status = json.load(reply)
    return version["version"], status["release"]


def num_running(url: str) -> float:
    """``num_requests_running`` over all engines."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=LIMIT_S) as reply:
        text = reply.read().decode()
    found = re.findall(r"^expertmesh:num_requests_running\{[^}]*\} (\S+)$", text, re.M)
    assert found
    return sum(map(float, found))


def test_a_second_cluster_takes_over(tmp_path: Path) -> None:
    with ExitStack() as rest, ExitStack() as first:
        blue = start_blue(first)
        service = Service(blue)
        rest.callback(service.close)
        clients = Clients(service.url)
        with clients.asking():
            clients.wait_for(NUM_CLIENTS)
            green = start_green(rest, tmp_path)
            assert (release_of(blue), release_of(green)) == ((RELEASE, RELEASE), (OTHER, OTHER))
            assert main(["--url", green, "health"]) == ExitCode.OK
            assert main(["--url", green, "generate", "hello", "--max-tokens", "2"]) == ExitCode.OK
            long = texts(service.url, LONG_TOKENS)
            begun = next(long)
            service.select(green)
            clients.wait_for(2 * NUM_CLIENTS)
            text = begun + "".join(long)
            while num_running(blue):
                clients.wait_for(1)
            first.close()
            clients.wait_for(2 * NUM_CLIENTS)
            assert text == "".join(texts(green, LONG_TOKENS))
        assert clients.errors == []
        assert len(set(clients.answers)) == 1
        with pytest.raises(OSError):
            num_running(blue)
