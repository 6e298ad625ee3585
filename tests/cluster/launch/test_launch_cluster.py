"""The real thing: ``expertmesh`` commands as processes, with Ray, workers and gateway."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.harness.serving_cluster import QUIET_S
from benchmarks.harness.stalls import wait_until
from cluster.cli.cluster.down import end_cluster
from cluster.core.process import wait_gone
from cluster.launch import state_file
from cluster.launch.orphans import find_by_files
from cluster.launch.plan import free_port

pytestmark = pytest.mark.ray

START_LIMIT_S = 240.0
STOP_LIMIT_S = 120.0
SHM = Path("/dev/shm")
SAME = ("--deterministic", "--detection-limit-s", f"{QUIET_S:g}")
"""Servers of different layouts give the same answers, and go on on a busy machine."""

FOREIGN_RAY = """
import sys, ray
from ray import serve

context = ray.init(
    address="local", _temp_dir=sys.argv[1], log_to_driver=False, include_dashboard=False, num_cpus=2
)
serve.start(http_options={"port": int(sys.argv[2])})

@serve.deployment(ray_actor_options={"num_cpus": 0})
def other(request):
    return "other"

serve.run(other.bind(), name="other", route_prefix="/other")
print(context.address_info["gcs_address"], flush=True)
sys.stdin.read()
ray.shutdown()
"""


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "cluster.cli.main", *words]


def run(*words: str, limit_s: float = START_LIMIT_S) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=limit_s)


def shared_memory() -> set[str]:
    """Files in shared memory that no process has mapped or open: no process will remove them."""
    files = {p.name for p in SHM.iterdir()} if SHM.is_dir() else set()
    return files - (_used_shared_memory() if files else set())


def _used_shared_memory() -> set[str]:
    used: set[str] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            used |= {m.path for m in process.memory_maps(grouped=True)}
            used |= {f.path for f in process.open_files()}
    return {path.removeprefix(f"{SHM}/") for path in used if path.startswith(f"{SHM}/")}


def fetch(url: str) -> str:
    with urllib.request.urlopen(url, timeout=120) as reply:
        return str(reply.read().decode())


@dataclass(slots=True)
class Server:
    """One ``expertmesh serve`` in the foreground."""

    child: subprocess.Popen[str]
    http: str = ""
    grpc: str = ""
    folder: Path = Path()
    lines: list[str] = field(default_factory=list)

    @classmethod
    def start(cls, *words: str) -> Server:
        """Started as a shell starts ``serve &``: with SIGINT ignored."""
        ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            ports = ["--port", str(free_port("127.0.0.1")), "--grpc-port", "0"]
            given = [] if "--port" in words else ports
            child = subprocess.Popen(
                command("serve", *given, "--drain-lead-s", "0", *words),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        finally:
            signal.signal(signal.SIGINT, ignored)
        return cls(child)

    def wait_ready(self) -> None:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        assert line.startswith("expertmesh ready "), self.child.communicate()[1]
        words = dict(word.split("=", 1) for word in line.split()[2:])
        self.http, self.grpc = words["http"], words["grpc"]
        self.folder = Path(self.record.temp_dir)

    @property
    def record(self) -> state_file.ClusterRecord:
        found = state_file.read_record(f"serve-{self.child.pid}")
        assert found is not None
        return found

    def stop(self, number: int) -> tuple[int, str]:
        """Exit code, and what came on stdout after the ready line."""
        self.child.send_signal(number)
        output, _ = self.child.communicate(timeout=STOP_LIMIT_S)
        return self.child.returncode, output


@pytest.fixture
def servers(state_home: Path) -> Iterator[list[Server]]:
    """Servers of a test; those that still run are ended."""
    started: list[Server] = []
    yield started
    for server in started:
        server.child.kill()
        server.child.communicate()
    for record in state_file.all_records():
        end_cluster(record, STOP_LIMIT_S)


def is_free(url: str) -> bool:
    found: list[Any] = [c.laddr for c in psutil.net_connections("tcp") if c.status == "LISTEN"]
    return int(url.rsplit(":", 1)[1]) not in [address.port for address in found]


def assert_nothing_left(server: Server, memory_before: set[str]) -> None:
    assert find_by_files(server.folder) == []
    assert not server.folder.exists()
    assert is_free(server.http)
    assert is_free(server.grpc)
    wait_until(lambda: shared_memory() <= memory_before, "the end of its shared memory")


def generate(url: str, *words: str) -> str:
    done = run(
        "--url", url, "generate", "ROMEO:", "--max-tokens", "8", "--temperature", "0", *words
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_serve_twice_kill_one_start_up_beside_it(servers: list[Server]) -> None:
    """Two servers side by side; one is killed outright; ``up`` cleans up after it and runs."""
    memory_before = shared_memory()
    servers += [Server.start(*SAME), Server.start("--num-expert-workers", "1", *SAME)]
    one, two = servers
    one.wait_ready()
    two.wait_ready()
    text = generate(one.http)
    assert text == generate(two.http)

    status = json.loads(run("--url", one.http, "status", "--json").stdout)
    assert (status["schema"], status["state"]) == (1, "SERVING")
    names = [w["name"] for w in status["workers"]]
    assert sorted(names) == ["attention-0", "expert-0", "expert-1"]
    placement = json.loads(run("--url", one.http, "placement", "--json").stdout)
    assert len(placement["banks"][0]["physical_to_logical"]) == 2

    launcher = two.record.launcher.pid
    os.kill(two.child.pid, signal.SIGSTOP)  # so that neither sees the other die
    os.kill(launcher, signal.SIGKILL)
    two.child.kill()
    two.child.communicate()

    ports = ["--port", str(free_port("127.0.0.1")), "--grpc-port", str(free_port("127.0.0.1"))]
    up = run("up", *ports)
    assert up.returncode == 0, up.stderr
    assert up.stdout.startswith("expertmesh ready ")
    assert up.stdout.count("\n") == 1
    assert_nothing_left(two, memory_before)
    assert generate(one.http) == text

    again = run("up", *ports, "--json")
    assert again.returncode == 0
    assert json.loads(again.stdout)["http"] == f"http://127.0.0.1:{ports[1]}"
    other = run("up", "--port", "0")
    assert other.returncode == 5
    assert f"--port: {ports[1]}, not 0" in other.stderr
    assert run("--name", "default", "status").returncode == 0
    record = state_file.read_record("default")
    assert record is not None
    assert run("down", "-y").returncode == 0
    assert find_by_files(Path(record.temp_dir)) == []
    assert run("--name", "default", "status").returncode == 3

    assert generate(one.http) == text
    assert one.stop(signal.SIGINT) == (130, "")
    assert_nothing_left(one, memory_before)
    assert list(state_file.all_records()) == []


def test_a_killed_front_process_leaves_nothing(servers: list[Server]) -> None:
    memory_before = shared_memory()
    servers.append(Server.start("--mode", "local"))
    server = servers[0]
    server.wait_ready()
    assert generate(server.http)
    server.child.kill()
    wait_until(lambda: not server.folder.exists(), "the end of its folder")
    assert_nothing_left(server, memory_before)


@pytest.mark.slow
def test_a_signal_while_starting_leaves_nothing(servers: list[Server]) -> None:
    servers.append(Server.start())
    server = servers[0]
    name = f"serve-{server.child.pid}"

    def has_address() -> bool:
        known = state_file.read_record(name)
        return known is not None and bool(known.address)

    wait_until(has_address, "the address of its Ray")
    record = state_file.read_record(name)
    assert record is not None
    server.folder = Path(record.temp_dir)
    server.http, server.grpc = record.http, record.grpc
    assert server.stop(signal.SIGTERM) == (130, "")
    assert_nothing_left(server, shared_memory())


@contextlib.contextmanager
def foreign_ray(folder: Path, port: int) -> Iterator[str]:
    """Somebody else's Ray with a Serve app of its own; yields its address."""
    child = subprocess.Popen(
        [sys.executable, "-c", FOREIGN_RAY, str(folder), str(port)],
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert child.stdout is not None
        yield child.stdout.readline().strip()
    finally:
        child.communicate(timeout=120)


def serve_apps(url: str) -> Sequence[str]:
    return sorted(json.loads(fetch(f"{url}/-/routes")).values())


@pytest.mark.slow
def test_a_joined_ray_keeps_all_that_is_its_own(
    servers: list[Server], monkeypatch: pytest.MonkeyPatch, short_folder: Path
) -> None:
    port = free_port("127.0.0.1")
    url = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with foreign_ray(short_folder, port) as address:
        other, own = str(free_port("127.0.0.1")), str(free_port("127.0.0.1"))
        ports = ["--port", own, "--grpc-port", "0"]
        refused = run("serve", "--address", address, *ports, "--serve-proxy", other)
        assert refused.returncode == 5
        assert f"differs from {port}" in refused.stderr.splitlines()[-1]  # progress is before it
        refused = run("serve", "--address", address, *ports, "--cpus-per-worker", "2")
        assert refused.returncode == 5
        assert "--cpus-per-worker (2) does not fit" in refused.stderr

        joined = ["--address", address, *ports, "--serve-proxy", str(port)]
        auto = ["--mode", "auto", "--cpus-per-worker", "0.5", "--num-expert-workers", "1"]
        servers.append(Server.start(*joined, *auto))
        servers[0].wait_ready()
        assert generate(url) == generate(f"http://127.0.0.1:{own}")
        status = json.loads(fetch(f"{url}/cluster/v1/status"))
        assert (status["mode"], len(status["workers"])) == ("colocated", 2)
        assert "1 attention + 1 expert worker" in status["mode_reason"]
        assert serve_apps(url) == ["expertmesh", "other"]
        assert servers[0].stop(signal.SIGTERM) == (0, "")
        assert serve_apps(url) == ["other"]
        assert fetch(f"{url}/other") == "other"
        check_a_cluster_on_its_own(address, ports, f"http://127.0.0.1:{own}")
        assert serve_apps(url) == ["other"]


def check_a_cluster_on_its_own(address: str, ports: Sequence[str], url: str) -> None:
    """``up`` in a joined Ray: again and again, from elsewhere, and down by name."""
    up = ["up", "--address", address, *ports, "--num-expert-workers", "1"]
    small = ["--cpus-per-worker", "0.5"]
    first = run(*up, *small)
    assert first.returncode == 0, first.stderr
    record = state_file.read_record("default")
    assert record is not None
    assert wait_gone(record.launcher, STOP_LIMIT_S)  # nobody on this host owns it
    controller = json.loads(run("status", "--json").stdout)["controller_pid"]
    assert generate(url)

    again = run(*up, *small)
    assert (again.returncode, again.stdout) == (0, first.stdout), again.stderr
    other = run(*up, "--cpus-per-worker", "0.25", "--name", "else")
    assert other.returncode == 5
    assert "--cpus-per-worker: 0.5, not 0.25" in other.stderr
    assert state_file.read_record("else") is None
    status = json.loads(run("--url", url, "status", "--json").stdout)
    assert status["controller_pid"] == controller
    (node,) = {w["node"] for w in status["workers"]}
    assert run("health", "--node", node).returncode == 0
    assert run("health", "--node", "10.9.9.9").returncode == 4
    refused = run("drain", "worker", "attention-0", "--address", address, "--deadline", "5")
    assert refused.returncode == 5, refused.stderr
    assert "attention-0" in refused.stderr

    state_file.remove_record("default")  # as in a pod that came later
    down = run("down", "-y", "--address", address)
    assert down.returncode == 0, down.stderr
    assert "expertmesh-controller" in down.stderr
    nothing = run("down", "-y", "--address", address, "--json")
    assert json.loads(nothing.stdout)["was_up"] is False
