"""A cluster whose numbers of workers follow its hosts: they register, stop, die, and come back.

Clients stream all the time; what they get equals the streams of an undisturbed run.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.harness.fault_rows import Form
from tests.pretend_hosts.hosts import Streams, address_of, stream, wait_serving, wait_until
from tests.pretend_hosts.role_hosts import ROLES, URL, RoleHosts, role_hosts

pytestmark = [pytest.mark.ray, pytest.mark.slow]

FORM = Form(num_streams=4, num_tokens=48)
MORE = {"h5": "expert", "h6": "attention", "h7": "expert"}
"""Hosts that register later."""
QUIET_S = 15.0
"""Longer than new nodes take to settle."""
RAY = ("python", "-m", "ray.scripts.scripts")


class FollowedHosts:
    """Hosts and the cluster on them."""

    def __init__(self, hosts: RoleHosts, folder: Path) -> None:
        self.hosts = hosts
        self.log = folder / "clients.log"
        self.calm = self.stream()

    def stream(self) -> Streams:
        return stream(self.hosts, URL, self.log, FORM, lambda: None)

    def under_streams(self, act: Callable[[], None]) -> None:
        """Do this while clients stream, and check what they get."""
        with ThreadPoolExecutor(1) as pool:
            acting = pool.submit(act)
            count = 0
            while not acting.done() or not count:
                assert self.stream().tokens == self.calm.tokens
                count += 1
            acting.result()

    def serving_on(self, host: str) -> list[str]:
        """Workers that serve there."""
        workers = self.hosts.status()["workers"]
        node = address_of(host)
        return [w["name"] for w in workers if w["node"] == node and w["state"] == "SERVING"]

    def counts(self) -> tuple[int, int]:
        """Attention and expert workers that serve; none is on its way."""
        status = self.hosts.status()
        states = [(w["role"], w["state"]) for w in status["workers"]]
        assert status["state"] == "SERVING", (status["state"], status["problems"], states)
        assert {state for _, state in states} <= {"SERVING", "LOST", "DRAINED"}
        return states.count(("attention", "SERVING")), states.count(("expert", "SERVING"))

    def register(self, *hosts: str) -> None:
        """New hosts join the Ray cluster, as pods of a larger group do."""
        for host in hosts:
            self.hosts.run("boot", host)
            self.hosts.begin_node(host)

    def wait_used(self, *hosts: str) -> None:
        """Workers serve there. A host whose Ray gives its start up begins again, as a pod does."""

        def is_used(host: str) -> bool:
            if self.hosts.has_ended(host):
                self.hosts.kill(host)
                self.hosts.come_back(host)
            return bool(self.serving_on(host))

        for host in hosts:
            wait_until(partial(is_used, host), f"{host} is used")
        wait_serving(self.hosts.status)

    def operations(self) -> list[dict[str, Any]]:
        """The cluster's operations, newest last."""
        answer = json.loads(self.hosts.command("h1", "operations", "list", "--json"))
        found: list[dict[str, Any]] = answer["operations"]
        return found

    def stay_quiet(self) -> None:
        """Nothing begins for a while."""
        before, until = self.operations(), time.monotonic() + QUIET_S
        while time.monotonic() < until:
            assert self.hosts.status()["state"] == "SERVING"
        assert self.operations() == before


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FollowedHosts]:
    with role_hosts("--detection-limit-s", "4", "--follow-nodes") as hosts:
        hosts.roles = {**ROLES, **MORE}
        yield FollowedHosts(hosts, tmp_path_factory.mktemp("clients"))


def test_hosts_that_register_together_are_used_by_one_order(followed: FollowedHosts) -> None:
    def act() -> None:
        followed.register("h5", "h6")
        followed.wait_used("h5", "h6")

    followed.under_streams(act)
    assert followed.counts() == (2, 3)
    (operation,) = followed.operations()
    assert (operation["kind"], operation["state"]) == ("scale", "SUCCEEDED")
    assert sorted(operation["scale"]["added"]) == ["attention-1", "expert-2"]
    for host in ("h5", "h6"):
        assert f"node {address_of(host)} registered" in operation["message"]
    events = followed.hosts.command("h1", "events")
    assert f"node {address_of('h5')} registered" in events
    followed.under_streams(followed.stay_quiet)


@pytest.mark.parametrize("host", ["h5", "h6", "h3"])
def test_a_host_that_is_stopped_is_not_missed_and_used_again(
    followed: FollowedHosts, host: str
) -> None:
    """h3 has a worker of the start, the others those of places that were added."""
    hosts = followed.hosts
    before, (worker,) = followed.counts(), followed.serving_on(host)
    number = len(followed.operations())

    def act() -> None:
        hosts.stop(host)
        wait_serving(hosts.status)
        assert not followed.serving_on(host)
        hosts.kill(host)
        followed.stay_quiet()

    followed.under_streams(act)
    assert sum(followed.counts()) == sum(before) - 1
    newest = followed.operations()[number:]
    assert [(o["kind"], o["target"], o["state"]) for o in newest] == [
        ("drain", worker, "SUCCEEDED")
    ]

    def act_again() -> None:
        hosts.come_back(host)
        followed.wait_used(host)

    followed.under_streams(act_again)
    assert followed.counts() == before
    assert followed.operations()[-1]["kind"] == "scale"


def test_a_host_that_dies_is_waited_for(followed: FollowedHosts) -> None:
    hosts, before, number = followed.hosts, followed.counts(), len(followed.operations())

    def act() -> None:
        hosts.kill("h4")
        wait_until(lambda: hosts.status()["state"] == "DEGRADED", "its worker is missed")
        hosts.come_back("h4")
        followed.wait_used("h4")
        followed.stay_quiet()

    followed.under_streams(act)
    assert followed.counts() == before
    assert len(followed.operations()) == number


def test_an_order_without_room_waits_for_the_node_that_ray_is_asked_for(
    followed: FollowedHosts,
) -> None:
    """Ray's autoscaler sees a placement group that waits; what it adds is begun by hand here."""
    hosts, (num_attention, num_experts) = followed.hosts, followed.counts()

    def act() -> None:
        words = ("scale", "--expert", str(num_experts + 1), "--wait", "0", "--json")
        operation = json.loads(hosts.command("h1", *words))
        assert operation["state"] == "RUNNING"
        demand = "1.0} * 1 (PACK): 1+ pending placement groups"
        wait_until(lambda: demand in hosts.run("exec", "h0", *RAY, "status"), "a demand")
        assert followed.operations()[-1]["state"] == "RUNNING"
        followed.register("h7")
        followed.wait_used("h7")

    followed.under_streams(act)
    assert followed.counts() == (num_attention, num_experts + 1)
    assert followed.operations()[-1]["state"] == "SUCCEEDED"
    followed.under_streams(followed.stay_quiet)
