"""A cluster over hosts that are labelled for roles: hosts are drained, killed, and come back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.clients import NO_REDIS, redis_server
from tests.harness.fault_rows import Form
from tests.pretend_hosts.hosts import address_of, stream, wait_serving, wait_until
from tests.pretend_hosts.role_hosts import (
    ATTENTION,
    GATEWAY,
    HEAD,
    SPARE,
    URL,
    RoleHosts,
    role_hosts,
)

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FORM = Form(num_streams=4, num_tokens=48)


@pytest.fixture(scope="module")
def hosts() -> Iterator[RoleHosts]:
    with role_hosts("--detection-limit-s", "4") as hosts:
        yield hosts


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
    other = ("--address", "auto", *hosts.options, "--num-redundant-experts", "1")
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
    workers = hosts.serving()
    hit = stream(hosts, URL, log, FORM, lambda: hosts.kill("h0"), clients_on="h2")
    assert hit.tokens == calm.tokens
    hosts.come_back("h0")
    wait_until(
        lambda: hosts.asks("h0", "up", "--address", "auto", *hosts.options), "up sees it all"
    )
    assert hosts.serving() == workers
    assert stream(hosts, URL, log, FORM, lambda: None).tokens == calm.tokens


def test_down_ends_it_from_any_host(hosts: RoleHosts) -> None:
    hosts.command("h2", "down", "-y", "--address", "auto")
    assert not hosts.asks("h2", "health")
