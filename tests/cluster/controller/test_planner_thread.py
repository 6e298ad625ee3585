"""Plans are computed in a thread of their own, and stale ones are dropped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from cluster.controller.operations import OperationState
from cluster.controller.planner_thread import PlannerThread
from cluster.controller.rebalance_job import RebalanceCommand
from cluster.core.errors import ConfigError, ConflictError
from cluster.core.frames import EpochSwitched, SwitchEpoch
from tests.cluster.controller.fakes_cluster import FakeCluster
from tests.cluster.controller.test_rebalancing import (
    SKEWED,
    answer,
    make,
    obey,
    outcomes,
    status,
    window,
)
from tests.harness.metric_values import metric

T = TypeVar("T")
Begin = tuple[PlannerThread, Callable[[str, float], None]]
LIMIT_S = 120.0


class LaterExecutor(Executor):
    """Does its work when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        self.waiting.append((future, lambda: fn(*args, **kwargs)))
        return future

    def work(self) -> int:
        """All that waits; how much that was."""
        waiting, self.waiting = self.waiting, []
        for future, fn in waiting:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(fn())
                except Exception as err:
                    future.set_exception(err)
        return len(waiting)


@pytest.fixture
def later() -> LaterExecutor:
    return LaterExecutor()


def work_and_obey(cluster: FakeCluster, later: LaterExecutor) -> None:
    """Plans are made and workers obey, until there is nothing left to do."""
    while later.work():
        cluster.tick(0.1)
        obey(cluster)


def test_the_controller_goes_on_while_a_plan_is_made(later: LaterExecutor) -> None:
    cluster = make(1, executor=later)
    window(cluster, SKEWED)
    assert len(later.waiting) == 1  # one decision, however many windows end meanwhile
    window(cluster, SKEWED)
    assert len(later.waiting) == 1
    assert cluster.state == "SERVING"
    assert status(cluster)["phase"] == ""
    work_and_obey(cluster, later)
    assert outcomes(cluster)["applied"] == 1
    assert cluster.known.placement.epoch > 1


def test_a_plan_for_a_cluster_that_has_changed_is_forgotten(later: LaterExecutor) -> None:
    cluster = make(1, executor=later)
    window(cluster, SKEWED)
    cluster.disconnect("expert-3")
    assert later.work() == 1
    cluster.tick(0.2)
    assert outcomes(cluster) == {}
    assert status(cluster)["phase"] == ""
    assert later.waiting == []


def test_an_order_waits_for_its_plan(later: LaterExecutor) -> None:
    cluster = make(1, enable_eplb=False, executor=later)
    window(cluster, SKEWED)
    rebalancing = cluster.controller.rebalancing
    dry = rebalancing.begin(RebalanceCommand(dry_run=True), cluster.now)
    assert dry.is_running
    assert rebalancing.plans.waits(dry.id)
    with pytest.raises(ConflictError, match="one operation at a time"):
        rebalancing.begin(RebalanceCommand(), cluster.now)
    later.work()
    cluster.tick(0.1)
    assert not rebalancing.plans.waits(dry.id)
    assert dry.state is OperationState.SUCCEEDED
    assert dry.result["action"] in ("split", "move")
    real = rebalancing.begin(RebalanceCommand(), cluster.now)
    work_and_obey(cluster, later)
    assert real.state is OperationState.SUCCEEDED
    assert cluster.known.placement.epoch > 1


def test_an_order_is_cancelled_while_it_is_planned(later: LaterExecutor) -> None:
    cluster = make(1, enable_eplb=False, executor=later)
    window(cluster, SKEWED)
    rebalancing = cluster.controller.rebalancing
    operation = rebalancing.begin(RebalanceCommand(), cluster.now)
    rebalancing.cancel(operation, cluster.now)
    assert operation.state is OperationState.CANCELLED
    assert outcomes(cluster) == {"cancelled": 1}
    later.work()
    cluster.tick(0.2)
    assert cluster.known.placement.epoch == 1
    assert rebalancing.is_idle
    with pytest.raises(ConflictError, match="has ended"):
        rebalancing.cancel(operation, cluster.now)


def test_a_stage_is_cancelled_while_its_shares_are_solved(later: LaterExecutor) -> None:
    cluster = make(1, enable_eplb=False, executor=later)
    window(cluster, SKEWED)
    operation = cluster.controller.rebalancing.begin(RebalanceCommand(), cluster.now)
    later.work()
    cluster.tick(0.1)
    assert len(later.waiting) == 1
    assert status(cluster)["phase"] == "plan"
    cluster.controller.rebalancing.cancel(operation, cluster.now)
    later.work()
    cluster.tick(0.2)
    assert operation.state is OperationState.CANCELLED
    assert cluster.known.placement.epoch == 1


def test_an_order_for_a_cluster_that_has_changed_fails(later: LaterExecutor) -> None:
    cluster = make(1, enable_eplb=False, executor=later)
    window(cluster, SKEWED)
    operation = cluster.controller.rebalancing.begin(RebalanceCommand(), cluster.now)
    cluster.disconnect("expert-3")
    later.work()
    cluster.tick(0.2)
    assert operation.state is OperationState.FAILED
    assert "has changed since" in operation.message


def test_a_stage_of_a_cluster_that_has_changed_ends_the_change(later: LaterExecutor) -> None:
    cluster = make(1, executor=later)
    window(cluster, SKEWED)
    later.work()
    cluster.tick(0.1)
    assert status(cluster)["phase"] == "plan"
    cluster.disconnect("expert-3")
    later.work()
    cluster.tick(0.2)
    assert outcomes(cluster) == {"failed": 1}
    assert cluster.controller.rebalancing.is_idle


@pytest.fixture
def thread() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(1) as pool:
        yield pool


def test_a_real_thread_may_take_its_time(thread: ThreadPoolExecutor) -> None:
    gate = threading.Event()
    thread.submit(gate.wait, LIMIT_S)
    cluster = make(1, enable_eplb=False, executor=thread)
    window(cluster, SKEWED)
    dry = cluster.controller.rebalancing.begin(RebalanceCommand(dry_run=True), cluster.now)
    cluster.tick(1.0)
    assert dry.is_running
    gate.set()
    thread.submit(int).result(LIMIT_S)  # the plan came before it
    cluster.tick(0.1)
    assert dry.state is OperationState.SUCCEEDED


def begin_plan(executor: Executor, seen: list[tuple[Future[Any], str, float]]) -> Begin:
    """Begins plans of a cluster that runs, and adds what their continuations get to ``seen``."""
    plans = PlannerThread(make(1, enable_eplb=False).known, executor)
    return plans, lambda what, now: plans.plan(
        what, lambda: 7, lambda *result: seen.append(result), now
    )


def test_a_failed_computation_hands_its_error_to_the_continuation(
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[tuple[Future[Any], str, float]] = []
    _, begin = begin_plan(RefusingExecutor(ZeroDivisionError("by zero")), seen)
    begin("a", 3.0)
    assert [result[1:] for result in seen] == [("by zero", 3.0)]
    assert "planning failed" in caplog.text


def test_a_task_that_was_dropped_is_not_followed(later: LaterExecutor) -> None:
    seen: list[tuple[Future[Any], str, float]] = []
    plans, begin = begin_plan(later, seen)
    begin("a", 0.0)
    begin("b", 0.0)
    assert plans.waits("a")
    assert plans.drop("a")
    assert not plans.waits("a")
    assert not plans.drop("a")
    later.work()
    plans.tick(1.0)
    assert [result[1:] for result in seen] == [("", 1.0)]
    assert not plans.waits("b")


def test_what_steps_waited_for_a_switch_is_counted() -> None:
    cluster = make(1)
    window(cluster, SKEWED)
    switched = 0
    while any(cluster.link.sent.values()):
        for name in tuple(cluster.link.sent):
            for frame in cluster.link.sent.pop(name):
                if isinstance(frame, SwitchEpoch):
                    switched += 1
                    cluster.send(
                        name,
                        EpochSwitched(
                            generation=frame.generation, epoch=frame.epoch, step=5, stall_s=0.02
                        ),
                    )
                else:
                    answer(cluster, name, frame)
    snapshot, last = cluster.controller.snapshot(), status(cluster)["last"]
    stall = "rebalance_stall_seconds"
    assert metric(snapshot, f"{stall}_count") == switched > 0
    assert metric(snapshot, f"{stall}_sum") == pytest.approx(0.02 * switched)
    assert metric(snapshot, f"{stall}_bucket", le="0.01") == 0
    assert metric(snapshot, f"{stall}_bucket", le="0.03") == switched
    reason = {"reason": "rebalance"}
    assert metric(snapshot, "migration_slots_moved_total", **reason) == last["slots_moved"] > 0
    assert metric(snapshot, "migration_bytes_total", **reason) == last["bytes"]
    assert metric(snapshot, "migration_seconds_count", **reason) == 1


class RefusingExecutor(Executor):
    """No plan can be made, until one can."""

    def __init__(self, error: Exception) -> None:
        self.error: Exception | None = error

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        if self.error is not None:
            future.set_exception(self.error)
        else:
            future.set_result(fn(*args, **kwargs))
        return future


def test_a_load_that_cannot_be_planned_is_reported_until_it_can() -> None:
    reason = "must be at least num_experts (8) in total"
    refusing = RefusingExecutor(ConfigError("num_expert_slots", 6, reason))
    cluster = make(1, executor=refusing)
    window(cluster, SKEWED)
    assert "num_expert_slots (6) must be at least" in status(cluster)["problem"]
    assert outcomes(cluster) == {"failed": 1}
    for is_dry in (True, False):
        command = RebalanceCommand(dry_run=is_dry)
        order = cluster.controller.rebalancing.begin(command, cluster.now)
        assert order.state is OperationState.FAILED
    assert outcomes(cluster) == {"failed": 2}, "a dry run changes nothing"
    assert "no placement can be planned: num_expert_slots (6)" in order.message
    refusing.error = None
    window(cluster, SKEWED)
    obey(cluster)
    assert status(cluster)["problem"] == ""
    assert outcomes(cluster)["applied"] == 1
