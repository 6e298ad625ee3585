"""Ending the fleets of all models in a Ray, without Ray."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from cluster.actors import ray_tools
from cluster.core.errors import NotReadyError
from cluster.core.fleets import CONTROLLER_NAME
from cluster.launch import teardown
from cluster.launch.teardown import end_leftovers, stop_fleets

FIRST, SECOND = "expertmesh", "expertmesh.model-1"
WAIT_S = 60.0


class Leftovers:
    """The actors of a Ray, and what was done to them."""

    def __init__(self) -> None:
        self.actors = [
            (FIRST, "attention-0"),
            (FIRST, CONTROLLER_NAME),
            (SECOND, "attention-0"),
            (SECOND, CONTROLLER_NAME),
        ]
        self.groups = [f"{FIRST}-workers", f"{SECOND}-workers-expert-3"]
        self.killed: list[tuple[str, str]] = []
        self.freed: list[str] = []

    def kill(self, names: Sequence[str], namespace: str) -> None:
        self.killed += [(namespace, name) for name in names]


@pytest.fixture
def leftovers(monkeypatch: pytest.MonkeyPatch) -> Leftovers:
    made = Leftovers()
    monkeypatch.setattr(ray_tools, "live_actors", lambda: made.actors)
    groups = lambda: [{"name": name} for name in made.groups]  # noqa: E731
    monkeypatch.setattr(ray_tools, "live_placement_groups", groups)
    monkeypatch.setattr(ray_tools, "kill_actors", made.kill)
    monkeypatch.setattr(ray_tools, "remove_placement_groups", made.freed.append)
    return made


def test_leftovers_of_all_fleets_end_with_the_controllers_first(leftovers: Leftovers) -> None:
    names = ["attention-0", CONTROLLER_NAME, "attention-0", CONTROLLER_NAME]
    assert end_leftovers() == names
    assert sorted(leftovers.killed) == sorted(leftovers.actors)
    assert [name for _, name in leftovers.killed[:2]] == [CONTROLLER_NAME] * 2
    assert sorted(leftovers.freed) == [FIRST, SECOND]


def test_resources_of_fleets_are_freed_without_any_actor(leftovers: Leftovers) -> None:
    leftovers.actors = []
    assert end_leftovers() == []
    assert sorted(leftovers.freed) == [FIRST, SECOND]
    assert not leftovers.killed


def test_fleets_are_stopped_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)
    asked: list[tuple[str, str]] = []

    def ask(method: str, limit_s: float, namespace: str) -> None:
        both.wait(WAIT_S)  # broken if one waits for the end of the other
        asked.append((method, namespace))

    monkeypatch.setattr(teardown, "ask_controller", ask)
    stop_fleets(WAIT_S, [FIRST, SECOND])
    assert sorted(asked) == [("stop", FIRST), ("stop", SECOND)]


def test_a_fleet_that_cannot_be_stopped_does_not_keep_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def ask(method: str, limit_s: float, namespace: str) -> None:
        asked.append(namespace)
        if namespace == FIRST:
            raise NotReadyError("no cluster runs there", "not_ready", 2.0)

    monkeypatch.setattr(teardown, "ask_controller", ask)
    stop_fleets(WAIT_S, [FIRST, SECOND])
    assert sorted(asked) == [FIRST, SECOND]
