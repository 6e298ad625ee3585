"""A cluster over hosts that are labelled for roles, started as ``docs/multi-host.md`` says.

Pretend hosts: h0 is Ray's head and runs nothing of ours, h1 the gateway and the controller, h2
attention, h3 and h4 experts. Ray asks for a token.
"""

from __future__ import annotations

import json
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.fault_rows import Form
from tests.test_pretend_hosts import TIMEOUT_S, Hosts, stream, why_not

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_HOSTS = 5
ROLES = {"h1": "gateway", "h2": "attention", "h3": "expert", "h4": "expert"}
HEAD, GATEWAY, ATTENTION, SPARE = "10.77.0.10", "10.77.0.11", "10.77.0.12", "10.77.0.14"
URL = f"http://{GATEWAY}:8000"
UP = ("--wait-nodes", str(NUM_HOSTS), "--host", "0.0.0.0", "--allow-unauthenticated")
SAME = ("--dtype", "float32", "--deterministic", "--detection-limit-s", "4")
FORM = Form(num_streams=4, num_tokens=48)
REDIS_PORT = 6390
CLI = (sys.executable, "-m", "cluster.cli.main")


class RoleHosts(Hosts):
    """Hosts on which ``expertmesh node`` runs in the foreground."""

    def __init__(self, folder: Path, redis: str = "") -> None:
        """``redis`` is where the head keeps Ray's state; empty: nowhere."""
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        super().__init__(
            folder / "n",
            RAY_AUTH_MODE="token",
            RAY_AUTH_TOKEN_PATH=str(token),
            EXPERTMESH_URL=URL,
        )
        self._folder = folder
        self._redis = redis
        self._nodes: dict[str, subprocess.Popen[str]] = {}

    def boot_node(self, host: str) -> None:
        """Have a host join (or begin) the Ray cluster."""
        address = f"10.77.0.{10 + int(host[1:])}"
        words = ["node", "--node-ip", address]
        if host == "h0":
            words += ["--head", "--num-cpus", "0"]
        else:
            words += ["--join", HEAD, "--role", ROLES[host], "--num-cpus", "1"]
        if host in self._nodes:  # it has died with its host
            self._nodes.pop(host).communicate(timeout=TIMEOUT_S)
        log = self._folder / f"{host}.log"
        state = [f"RAY_REDIS_ADDRESS={self._redis}"] if self._redis and host == "h0" else []
        self._nodes[host] = self.start(host, "env", *state, *CLI, *words, log=log)

    def power_off(self, host: str) -> None:
        """End everything on a host at once."""
        self.run("kill", host)

    def come_back(self, host: str) -> None:
        """Boot a host once it is quite gone, and have it join."""
        wait_until(lambda: self.boots(host))
        self.boot_node(host)

    def command(self, host: str, *words: str) -> str:
        """Stdout of an ``expertmesh`` command on a host; it must exit with 0."""
        return self.run("exec", host, *CLI, *words)

    def asks(self, host: str, *words: str) -> bool:
        """Whether an ``expertmesh`` command on a host exits with 0."""
        try:
            self.command(host, *words)
        except AssertionError:
            return False
        return True

    def up(self, host: str = "h0") -> str:
        """``up``, from any host."""
        return self.command(host, "up", "--address", "auto", *UP, *SAME)

    def status(self) -> dict[str, Any]:
        """``status`` as a client sees it."""
        return self.fetch("h2", f"{URL}/cluster/v1/status")

    def close(self) -> None:
        """End all that was started here."""
        with suppress(AssertionError):
            self.run("down")
        for node in self._nodes.values():
            with suppress(ProcessLookupError):
                node.send_signal(signal.SIGKILL)
            node.communicate(timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def redis_server() -> str:
    """Path of a redis-server; empty without one."""
    return shutil.which("redis-server") or ""


@pytest.fixture(scope="module")
def hosts(redis_server: str) -> Iterator[RoleHosts]:
    """The five hosts, with a cluster that ``up`` has started. With Redis it keeps Ray's state."""
    if reason := why_not():
        pytest.skip(reason)
    state = f"{GATEWAY}:{REDIS_PORT}" if redis_server else ""
    with tempfile.TemporaryDirectory(prefix="em", dir="/tmp") as folder:
        made = RoleHosts(Path(folder), state)
        redis = None
        try:
            made.run("up", str(NUM_HOSTS))
            if redis_server:
                words = ["--port", str(REDIS_PORT), "--protected-mode", "no", "--save", ""]
                log = Path(folder) / "redis.log"
                redis = made.start("h1", redis_server, *words, log=log)
            for host in ("h0", *ROLES):
                made.boot_node(host)
            wait_until(lambda: made.asks("h0", "up", "--address", "auto", *UP, *SAME))
            yield made
        finally:
            made.close()
            if redis is not None:
                redis.communicate(timeout=TIMEOUT_S)


def wait_until(is_true: Callable[[], bool], limit_s: float = TIMEOUT_S) -> None:
    deadline = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.5)


def wait_serving(hosts: RoleHosts) -> None:
    wait_until(lambda: hosts.status()["state"] == "SERVING")


def test_every_role_is_where_it_is_wanted(hosts: RoleHosts) -> None:
    status = hosts.status()
    where = {w["name"]: w["node"] for w in status["workers"]}
    assert where == {
        "attention-0": ATTENTION,
        "expert-0": "10.77.0.13",
        "expert-1": SPARE,
    }
    assert [g["http"] for g in status["gateway"]] == [f"{GATEWAY}:8000"]
    for node in where.values():
        assert hosts.asks("h3", "health", "--node", node)
    assert not hosts.asks("h3", "health", "--node", HEAD)
    body = {"prompt": "ROMEO:", "max_tokens": 8, "temperature": 0}
    assert hosts.fetch("h4", f"{URL}/v1/completions", body)["choices"][0]["text"]


def test_up_again_from_another_host_changes_nothing(hosts: RoleHosts) -> None:
    before = hosts.status()["controller_pid"]
    assert hosts.up("h3") == f"expertmesh ready http={URL} grpc={GATEWAY}:50051\n"
    assert hosts.status()["controller_pid"] == before
    other = ("--address", "auto", *UP, *SAME, "--num-redundant-experts", "1")
    assert not hosts.asks("h3", "up", *other)


def test_a_host_is_drained_by_itself_and_comes_back(hosts: RoleHosts, tmp_path: Path) -> None:
    """What a pod's preStop hook does, and then the pod's end and its successor."""
    log = tmp_path / "clients.log"
    calm = stream(hosts, URL, log, FORM, lambda: None)

    def drain() -> None:
        words = ("drain", "--node", SPARE, "--timeout", "90", "--address", "auto", "--json")
        operation = json.loads(hosts.command("h4", *words))
        assert operation["state"] == "SUCCEEDED"

    assert stream(hosts, URL, log, FORM, drain).tokens == calm.tokens
    hosts.power_off("h4")
    hosts.come_back("h4")
    wait_until(lambda: hosts.asks("h4", "health", "--node", SPARE))
    wait_serving(hosts)
    assert stream(hosts, URL, log, FORM, lambda: None).tokens == calm.tokens


def test_a_host_that_is_killed_costs_no_stream(hosts: RoleHosts, tmp_path: Path) -> None:
    """A pod that is deleted by force."""
    log = tmp_path / "clients.log"
    calm = stream(hosts, URL, log, FORM, lambda: None)
    hit = stream(hosts, URL, log, FORM, lambda: hosts.power_off("h4"))
    assert hit.tokens == calm.tokens
    hosts.come_back("h4")
    wait_until(lambda: hosts.asks("h4", "health", "--node", SPARE))
    wait_serving(hosts)


def test_streams_outlive_the_head(hosts: RoleHosts, tmp_path: Path, redis_server: str) -> None:
    """With Ray's state in Redis; the head comes back and the cluster answers orders again."""
    if not redis_server:
        pytest.skip("needs redis-server on PATH (Debian: apt-get install redis-server)")
    wait_serving(hosts)
    log = tmp_path / "clients.log"
    calm = stream(hosts, URL, log, FORM, lambda: None)
    workers = {w["name"]: w["pid"] for w in hosts.status()["workers"] if w["state"] == "SERVING"}
    hit = stream(hosts, URL, log, FORM, lambda: hosts.power_off("h0"))
    assert hit.tokens == calm.tokens
    hosts.come_back("h0")
    wait_until(lambda: hosts.asks("h0", "up", "--address", "auto", *UP, *SAME))
    after = {w["name"]: w["pid"] for w in hosts.status()["workers"] if w["state"] == "SERVING"}
    assert after == workers
    assert stream(hosts, URL, log, FORM, lambda: None).tokens == calm.tokens


def test_down_ends_it_from_any_host(hosts: RoleHosts) -> None:
    hosts.command("h2", "down", "-y", "--address", "auto")
    assert not hosts.asks("h2", "health")
