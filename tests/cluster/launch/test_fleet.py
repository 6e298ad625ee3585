"""What a launcher says about the workers of one model, and when the model is lost."""

from __future__ import annotations

from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError

from cluster.core.fleets import NAMESPACE
from cluster.launch import fleet
from cluster.launch.fleet import Fleet, describe_threads


class Clock:
    """A monotonic clock that tests move."""

    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


class Controller:
    """The handle of a controller; ``ray.get`` is replaced by a call of what ``remote`` returns."""

    def __init__(self) -> None:
        self.answer: dict[str, Any] | Exception = {"state": "SERVING", "error": None}
        self.snapshot = self

    def remote(self) -> Controller:
        return self


def get(controller: Controller, timeout: float) -> dict[str, Any]:
    if isinstance(controller.answer, Exception):
        raise controller.answer
    return controller.answer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(fleet, "time", made)
    monkeypatch.setattr(ray, "get", get)
    return made


def make_fleet(controller: Controller) -> Fleet:
    made = Fleet(NAMESPACE)
    made._controller = controller
    return made


@pytest.mark.parametrize("state", ["SERVING", "DEGRADED", "RECOVERING"])
def test_a_model_that_is_served_is_not_lost(clock: Clock, state: str) -> None:
    controller = Controller()
    controller.answer = {"state": state, "error": None}
    assert make_fleet(controller).find_loss() is None


def test_a_stopped_cluster_is_lost_with_its_error(clock: Clock) -> None:
    controller = Controller()
    controller.answer = {"state": "STOPPED", "error": "no attention worker is left"}
    assert make_fleet(controller).find_loss() == "no attention worker is left"


@pytest.mark.parametrize(
    "error", [ActorUnavailableError("away", b"1" * 16), GetTimeoutError("silent")]
)
def test_a_controller_is_awaited_for_a_minute(clock: Clock, error: Exception) -> None:
    controller = Controller()
    watched = make_fleet(controller)
    assert watched.find_loss() is None
    controller.answer = error
    clock.now_s += 60.0
    assert watched.find_loss() is None
    clock.now_s += 1.0
    assert watched.find_loss() == "the controller is lost, see the log"
    controller.answer = {"state": "SERVING", "error": None}
    assert watched.find_loss() is None
    controller.answer = error
    clock.now_s += 60.0
    assert watched.find_loss() is None, "counted from its last answer"


def test_a_fleet_that_was_started_elsewhere_is_lost_soon_without_its_controller(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    controllers = {NAMESPACE: Controller()}
    monkeypatch.setattr(ray, "get_actor", lambda name, namespace: find(namespace))

    def find(namespace: str) -> Controller:
        if namespace not in controllers:
            raise ValueError("there is no such actor")
        return controllers[namespace]

    there, gone = Fleet(NAMESPACE), Fleet(f"{NAMESPACE}.model-1")
    clock.now_s += 6.0
    assert there.find_loss() is None
    gone._heard_at = clock.now_s
    clock.now_s += 5.0
    assert gone.find_loss() is None, "its controller may be starting"
    clock.now_s += 1.0
    assert gone.find_loss() == "the controller is lost, see the log"
    assert there.find_loss() is None


@pytest.mark.parametrize(
    ("threads", "words"),
    [
        ([2], "1 worker with 2 compute threads"),
        ([1, 1, 1], "3 workers with 1 compute thread each"),
        ([1, 4, 1], "1 worker with 4 compute threads, 2 workers with 1 compute thread each"),
        ([None, 4], "1 worker with 4 compute threads"),
        ([None], ""),
    ],
)
def test_compute_threads_are_told_by_number(threads: list[int | None], words: str) -> None:
    assert (
        describe_threads([{"threads": number, "state": "SERVING"} for number in threads]) == words
    )


def test_workers_that_are_gone_are_not_counted() -> None:
    states = ("SERVING", "LOST", "DRAINED")
    words = describe_threads([{"threads": 1, "state": state} for state in states])
    assert words == "1 worker with 1 compute thread"
