"""The host of Ray's head, which has an expert worker, too, is powered off and comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.clients import NO_REDIS, redis_server
from tests.harness.fault_rows import Form
from tests.pretend_hosts.hosts import stream, wait_serving, wait_until
from tests.pretend_hosts.role_hosts import HEAD, URL, RoleHosts, role_hosts

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROLES = {"h0": "expert", "h1": "gateway", "h2": "attention", "h3": "expert"}
FORM = Form(num_streams=4, num_tokens=48)


@pytest.fixture
def hosts() -> Iterator[RoleHosts]:
    if not redis_server():
        pytest.skip(NO_REDIS)
    with role_hosts("--detection-limit-s", "4", roles=ROLES) as hosts:
        yield hosts


def serving_on(hosts: RoleHosts, node: str) -> list[str]:
    """Names of the workers that serve on a host."""
    workers = hosts.status()["workers"]
    return [w["name"] for w in workers if w["node"] == node and w["state"] == "SERVING"]


def test_streams_outlive_the_head_and_its_worker(hosts: RoleHosts, tmp_path: Path) -> None:
    """Without the head the other expert worker loads what was lost; with it a new worker comes."""
    workers, log = hosts.serving(), tmp_path / "clients.log"
    (lost,) = serving_on(hosts, HEAD)
    del workers[lost]
    calm = stream(hosts, URL, log, FORM, lambda: None, clients_on="h2")
    hit = stream(hosts, URL, log, FORM, lambda: hosts.power_off("h0"), clients_on="h2")
    assert hit.tokens == calm.tokens
    without = hosts.status()
    assert (without["state"], without["experts_complete"]) == ("DEGRADED", True)
    assert hosts.serving() == workers
    hosts.come_back("h0")
    wait_until(
        lambda: hosts.asks("h0", "up", "--address", "auto", *hosts.options), "up sees it all"
    )
    wait_serving(hosts.status)
    (new,) = serving_on(hosts, HEAD)
    assert new != lost
    after = hosts.serving()
    del after[new]
    assert after == workers
    assert stream(hosts, URL, log, FORM, lambda: None, clients_on="h2").tokens == calm.tokens
