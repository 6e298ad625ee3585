"""A cluster over hosts that are labelled for roles, started as ``docs/multi-host.md`` says.

Pretend hosts: h0 is Ray's head and runs nothing of ours, h1 the gateway and the controller, h2
attention, h3 and h4 experts. Ray asks for a token.
"""

from __future__ import annotations

import json
import secrets
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness.clients import NO_REDIS, redis_server
from tests.harness.fault_rows import Form
from tests.pretend_hosts.hosts import (
    TIMEOUT_S,
    NodeHosts,
    address_of,
    stream,
    wait_serving,
    wait_until,
    why_not,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_HOSTS = 5
ROLES = {"h1": "gateway", "h2": "attention", "h3": "expert", "h4": "expert"}
HEAD, GATEWAY, ATTENTION, SPARE = map(address_of, ("h0", "h1", "h2", "h4"))
URL = f"http://{GATEWAY}:8000"
UP = ("--wait-nodes", str(NUM_HOSTS), "--host", "0.0.0.0", "--allow-unauthenticated")
SAME = ("--dtype", "float32", "--deterministic", "--detection-limit-s", "4")
FORM = Form(num_streams=4, num_tokens=48)
REDIS_PORT = 6390
REDIS_PASSWORD = "of-redis"
CLI = (sys.executable, "-m", "cluster.cli.main")


class RoleHosts(NodeHosts):
    """Hosts on which ``expertmesh node`` runs in the foreground."""

    def __init__(self, folder: Path, redis: str = "") -> None:
        """``redis`` is where the head keeps Ray's state; empty: nowhere."""
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        more = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        super().__init__(folder, EXPERTMESH_URL=URL, **more)
        self._redis = redis

    def begin_node(self, host: str) -> None:
        """Have a host join (or begin) the Ray cluster."""
        words = ["node", "--node-ip", address_of(host)]
        if host == "h0":
            state = redis_variables(self._redis) if self._redis else []
            words += ["--head", "--num-cpus", "0", "--background"]
            self.run("exec", host, "env", *state, *CLI, *words)
        else:
            words += ["--join", HEAD, "--role", ROLES[host], "--num-cpus", "1"]
            self.begin(host, *CLI, *words)

    def come_back(self, host: str) -> None:
        """Boot a host once it is quite gone, and have it join."""
        wait_until(lambda: self.boots(host), f"{host} is quite gone")
        self.begin_node(host)

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


@pytest.fixture(scope="module")
def hosts() -> Iterator[RoleHosts]:
    """The five hosts, with a cluster that ``up`` has started. With Redis it keeps Ray's state."""
    if reason := why_not():
        pytest.skip(reason)
    server = redis_server()
    state = f"{GATEWAY}:{REDIS_PORT}" if server else ""
    with tempfile.TemporaryDirectory(prefix="em", dir="/tmp") as folder:
        made = RoleHosts(Path(folder), state)
        redis = None
        try:
            made.run("up", str(NUM_HOSTS))
            if server:
                words = ["--port", str(REDIS_PORT), "--requirepass", REDIS_PASSWORD, "--save", ""]
                log = Path(folder) / "redis.log"
                redis = made.start("h1", server, *words, log=log)
            for host in ("h0", *ROLES):
                made.begin_node(host)
            made.up()
            yield made
        finally:
            made.close()
            if redis is not None:
                redis.communicate(timeout=TIMEOUT_S)


def redis_variables(address: str) -> list[str]:
    return [f"RAY_REDIS_ADDRESS={address}", f"RAY_REDIS_PASSWORD={REDIS_PASSWORD}"]


def test_every_role_is_where_it_is_wanted(hosts: RoleHosts) -> None:
    status = hosts.status()
    where = {w["name"]: w["node"] for w in status["workers"]}
    assert where == {
        "attention-0": ATTENTION,
        "expert-0": address_of("h3"),
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
        words = ("drain", "node", SPARE, "--deadline", "90", "--address", "auto", "--json")
        operation = json.loads(hosts.command("h4", *words))
        assert operation["state"] == "SUCCEEDED"

    assert stream(hosts, URL, log, FORM, drain).tokens == calm.tokens
    hosts.kill("h4")
    hosts.come_back("h4")
    wait_until(lambda: hosts.asks("h4", "health", "--node", SPARE), "its worker serves")
    wait_serving(hosts.status)
    assert stream(hosts, URL, log, FORM, lambda: None).tokens == calm.tokens


def test_a_host_that_is_killed_costs_no_stream(hosts: RoleHosts, tmp_path: Path) -> None:
    """A pod that is deleted by force."""
    log = tmp_path / "clients.log"
    calm = stream(hosts, URL, log, FORM, lambda: None)
    hit = stream(hosts, URL, log, FORM, lambda: hosts.kill("h4"))
    assert hit.tokens == calm.tokens
    hosts.come_back("h4")
    wait_until(lambda: hosts.asks("h4", "health", "--node", SPARE), "its worker serves")
    wait_serving(hosts.status)


def test_streams_outlive_the_head(hosts: RoleHosts, tmp_path: Path) -> None:
    """With Ray's state in Redis; the head comes back and the cluster answers orders again."""
    if not redis_server():
        pytest.skip(NO_REDIS)
    wait_serving(hosts.status)
    log = tmp_path / "clients.log"
    calm = stream(hosts, URL, log, FORM, lambda: None)
    workers = {w["name"]: w["pid"] for w in hosts.status()["workers"] if w["state"] == "SERVING"}
    hit = stream(hosts, URL, log, FORM, lambda: hosts.kill("h0"), clients_on="h2")
    assert hit.tokens == calm.tokens
    hosts.come_back("h0")
    wait_until(lambda: hosts.asks("h0", "up", "--address", "auto", *UP, *SAME), "up sees it all")
    after = {w["name"]: w["pid"] for w in hosts.status()["workers"] if w["state"] == "SERVING"}
    assert after == workers
    assert stream(hosts, URL, log, FORM, lambda: None).tokens == calm.tokens


def test_down_ends_it_from_any_host(hosts: RoleHosts) -> None:
    hosts.command("h2", "down", "-y", "--address", "auto")
    assert not hosts.asks("h2", "health")
