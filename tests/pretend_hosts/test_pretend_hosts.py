"""One attention and two expert workers on three hosts, in network namespaces of this machine."""

from __future__ import annotations

import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.local_engine import LocalEngine
from cluster.config.cluster import EngineSection
from cluster.launch.model_source import bundled_checkpoint
from tests.harness.fault_rows import FORMS, FULL, Form, state_of
from tests.pretend_hosts.hosts import (
    TIMEOUT_S,
    NodeHosts,
    address_of,
    host_of,
    stream,
    wait_serving,
    wait_until,
    why_not,
)
from workers.requests.request import SamplingParams

pytestmark = pytest.mark.ray

HEAD = address_of("h0")
NAMES = ("h0", "h1", "h2")
CLI = (sys.executable, "-m", "cluster.cli.main")
PROMPT = "ROMEO:\nWhat light is this"
NUM_TOKENS = 24
DETECTION_LIMIT_S = 4.0


@contextmanager
def three_hosts() -> Iterator[NodeHosts]:
    """With Ray on each, as ``expertmesh node`` starts it: its clients show a token."""
    if reason := why_not():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="em", dir="/tmp") as folder:
        token = Path(folder) / "token"
        token.write_text(secrets.token_hex(32))
        made = NodeHosts(Path(folder), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
        try:
            made.run("up", str(len(NAMES)))
            for host in NAMES:
                begin_node(made, host)
            yield made
        finally:
            made.close()


def begin_node(hosts: NodeHosts, host: str) -> None:
    """A host becomes the head, or joins it."""
    words = ["node", "--node-ip", address_of(host), "--num-cpus", "1"]
    if host == "h0":
        hosts.run("exec", host, *CLI, *words, "--head", "--background")
    else:
        hosts.begin(host, *CLI, *words, "--join", HEAD)


def come_back(hosts: NodeHosts, host: str) -> None:
    """Boot a dead host once it is quite gone, and have it join."""
    wait_until(lambda: hosts.boots(host), f"{host} is quite gone")
    begin_node(hosts, host)


def expert_beside_the_head(status: dict[str, Any]) -> dict[str, Any]:
    """An expert worker that serves on another host than Ray's head."""
    serving = [w for w in status["workers"] if w["state"] == "SERVING"]
    return next(w for w in serving if w["role"] == "expert" and w["node"] != HEAD)


@contextmanager
def served_on(hosts: NodeHosts, log: Path) -> Iterator[str]:
    """A served cluster with a worker on each host, where each expert has two copies; its URL."""
    words = ["serve", "--address", "auto", "--host", HEAD, "--drain-lead-s", "0"]
    words += ["--wait-nodes", str(len(NAMES))]
    words += ["--allow-unauthenticated", "--dtype", "float32", "--deterministic"]
    words += ["--num-redundant-experts", "64", "--detection-limit-s", f"{DETECTION_LIMIT_S:g}"]
    server = hosts.start("h0", *CLI, *words, log=log)
    try:
        assert server.stdout is not None
        ready = server.stdout.readline()
        assert ready.startswith("expertmesh ready http="), log.read_text()
        yield ready.split("http=")[1].split()[0]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.communicate(timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def hosts() -> Iterator[NodeHosts]:
    with three_hosts() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def url(hosts: NodeHosts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served_on(hosts, tmp_path_factory.mktemp("served") / "serve.log") as url:
        yield url


@pytest.mark.slow
def test_a_host_that_is_powered_off_costs_no_stream_and_is_made_good(tmp_path: Path) -> None:
    """No process learns of its end. When it is back, a new worker takes the empty place.

    First of all: hosts of its own, before those that the others share.
    """
    log = tmp_path / "clients.log"
    with three_hosts() as hosts, served_on(hosts, tmp_path / "serve.log") as url:

        def status() -> dict[str, Any]:
            return hosts.fetch("h0", f"{url}/cluster/v1/status")

        gone = expert_beside_the_head(status())
        host = host_of(gone["node"])
        calm = stream(hosts, url, log, FULL, lambda: None)
        hit = stream(hosts, url, log, FULL, lambda: hosts.power_off(host))
        assert hit.tokens == calm.tokens
        print(f"longest gap {hit.longest_gap_s:.2f} s, limit {DETECTION_LIMIT_S:g} s")
        found = status()
        assert state_of(found, gone["name"]) == "LOST"
        assert found["state"] == "DEGRADED"
        assert found["experts_complete"]
        come_back(hosts, host)
        wait_serving(status)
        assert stream(hosts, url, log, FULL, lambda: None).tokens == calm.tokens


def test_three_hosts_answer_with_the_local_engines_tokens(hosts: NodeHosts, url: str) -> None:
    status = hosts.fetch("h1", f"{url}/cluster/v1/status")
    assert len({w["node"] for w in status["workers"]}) == 3
    body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
    answer = hosts.fetch("h2", f"{url}/v1/completions", body | {"return_token_ids": True})
    choice = answer["choices"][0]
    section = EngineSection(deterministic="on")
    local = LocalEngine(bundled_checkpoint(), dtype="float32", section=section)
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0)
    (expected,) = local.generate([choice["prompt_token_ids"]], params)
    assert tuple(choice["token_ids"]) == expected.token_ids


@pytest.mark.parametrize("form", FORMS)
def test_a_silenced_host_with_experts_costs_no_stream(
    hosts: NodeHosts, url: str, tmp_path: Path, form: Form
) -> None:
    """Frames to and from it are dropped; once healed, it disturbs no other host."""

    def status() -> dict[str, Any]:
        return hosts.fetch("h0", f"{url}/cluster/v1/status")

    for lost in (w for w in status()["workers"] if w["state"] == "LOST"):  # by another form
        hosts.kill(host_of(lost["node"]))
        come_back(hosts, host_of(lost["node"]))
    wait_serving(status)
    silenced = expert_beside_the_head(status())
    host = host_of(silenced["node"])
    log = tmp_path / "clients.log"
    calm = stream(hosts, url, log, form, lambda: None)
    hit = stream(hosts, url, log, form, lambda: hosts.mute(host))
    assert hit.tokens == calm.tokens
    print(f"longest gap {hit.longest_gap_s:.2f} s, limit {DETECTION_LIMIT_S:g} s")
    assert state_of(status(), silenced["name"]) == "LOST"
    hosts.run("heal", host)
    assert stream(hosts, url, log, form, lambda: None).tokens == calm.tokens
