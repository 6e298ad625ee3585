"""Faults of the network between hosts at the shipped limits: every process lives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from benchmarks.harness.stalls import heartbeat
from tests.harness.fault_rows import Form
from tests.pretend_hosts.hosts import stream, wait_serving
from tests.pretend_hosts.role_hosts import URL, RoleHosts, role_hosts

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FORM = Form(num_streams=4, num_tokens=96)
SILENCE_S = 3.5
"""Longer than the detection limit, 2 s."""
AFTER_SILENCE_S = 2.0
"""A stream may pause for as long after a silence."""
DEAD_PATH_S = 6.0
"""A stream may pause for as long when a path between two hosts loses everything."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[RoleHosts]:
    with role_hosts("--num-redundant-experts", "64") as hosts:
        yield hosts


def check_streams(hosts: RoleHosts, log: Path, limit_s: float, fault: Callable[[], object]) -> None:
    """Streams hit by a fault get the tokens of a calm run, and pause no longer than the limit.

    Time in which the machine stood still, or ran other work, does not count.
    """
    wait_serving(hosts.status)
    calm = stream(hosts, URL, log, FORM, lambda: None, clients_on="h1")
    began = heartbeat().clock()
    hit = stream(hosts, URL, log, FORM, fault, clients_on="h1")
    assert hit.tokens == calm.tokens
    print(f"longest gap {hit.longest_gap_s:.2f} s, limit {limit_s:g} s")
    assert hit.longest_gap_s <= limit_s + heartbeat().stalled_s(began)


def test_a_silence_at_the_controllers_host_costs_no_worker(
    hosts: RoleHosts, tmp_path: Path
) -> None:
    wait_serving(hosts.status)
    before = hosts.serving()
    limit_s = SILENCE_S + AFTER_SILENCE_S
    check_streams(
        hosts, tmp_path / "clients.log", limit_s, lambda: hosts.silence_for("h1", SILENCE_S)
    )
    wait_serving(hosts.status)
    assert hosts.serving() == before


@pytest.mark.parametrize(("sender", "receiver"), [("h2", "h3"), ("h3", "h2")])
def test_a_path_that_loses_everything_pauses_streams_briefly(
    hosts: RoleHosts, tmp_path: Path, sender: str, receiver: str
) -> None:
    """Of the experts behind the path there are copies elsewhere."""
    lose = partial(hosts.run, "lose", sender, receiver)
    try:
        check_streams(hosts, tmp_path / "clients.log", DEAD_PATH_S, lose)
    finally:
        hosts.run("find", sender, receiver)
