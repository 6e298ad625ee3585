"""Autoscaling, as the controller sees it: workers report numbers, and scalings begin, or not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cluster.config.autoscale import AutoscaleSection
from cluster.config.workers import WorkersSection
from cluster.controller.operations import Operation, OperationState
from tests.cluster.controller.fakes_cluster import CONFIG, FakeCluster
from tests.cluster.controller.test_scale import members, scale

pytestmark = pytest.mark.heavy

LIMITS: dict[str, Any] = {
    "max_attention_workers": 3,
    "min_expert_workers": 1,
    "max_expert_workers": 4,
}
BUSY = {"num_requests_running": 8.0, "kv_cache_usage_perc": 0.5}
CALM = {"num_requests_running": 1.0, "kv_cache_usage_perc": 0.1}
WAITING = 'num_requests_waiting_by_reason{reason="capacity"}'
QUEUED = {**BUSY, WAITING: 6.0}


class Load:
    """A cluster whose workers report a load twice a second."""

    def __init__(self, mode: str = "on", **more: Any) -> None:
        section = AutoscaleSection(**{"autoscale": mode, "down_s": 60.0, **LIMITS, **more})
        workers = WorkersSection(num_attention_workers=1, num_expert_workers=2)
        config = dataclasses.replace(CONFIG, workers=workers, autoscale=section)
        self.cluster = FakeCluster(1, 2, config=config)
        self.cluster.serve()
        self.slot_seconds = 0.0

    def last(self, seconds: float, slot_time: float = 0.3, **numbers: float) -> None:
        """Time passes with this load, on workers that have called."""
        known = self.cluster.known
        for _ in range(round(2 * seconds)):
            self.slot_seconds += slot_time / 2
            for record in list(known.workers.alive()):
                if not record.is_pending:
                    self.beat(record.name, numbers)
            self.cluster.tick(0.5)

    def beat(self, name: str, numbers: dict[str, float]) -> None:
        slot_seconds = {"expert_worker_slot_seconds_total": self.slot_seconds}
        self.cluster.beat(name, stats=slot_seconds if name.startswith("expert") else numbers)

    @property
    def operation(self) -> Operation | None:
        """The newest operation."""
        kept = self.cluster.known.operations.kept
        return kept[-1] if kept else None

    @property
    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.cluster.controller.snapshot()["autoscale"]
        return found

    def events(self) -> list[tuple[str, str]]:
        """Entries of autoscaling in the history."""
        history = self.cluster.controller.snapshot()["history"]
        found = [(e["cause"], e["effect"]) for e in history]
        return [(cause, effect) for cause, effect in found if cause.startswith("autoscaling")]


def test_it_is_off_by_default() -> None:
    load = Load("off")
    load.last(60, **QUEUED)
    assert load.operation is None
    assert load.status == {"mode": "off", "wanted": {}, "limits": {}, "reason": "", "waits_for": ""}


def test_a_queue_begins_the_scaling_that_a_client_could_order() -> None:
    load = Load()
    load.last(5, **BUSY)
    load.last(8, **QUEUED)
    operation = load.operation
    assert operation is not None
    assert (operation.kind, operation.target) == ("scale", "2 attention and 2 expert workers")
    assert load.status["waits_for"] == "scale-1.1 is under way"
    assert load.status["limits"] == {"attention": [1, 3], "expert": [1, 4]}
    ((cause, effect),) = load.events()
    assert cause.startswith("autoscaling: attention: ")
    assert cause.endswith("sequences wait at each worker, above 1")
    assert effect == "scale to 2 attention and 2 expert workers (scale-1.1)"
    load.last(1, **QUEUED)
    load.cluster.bring_up("attention-1")
    load.cluster.join_all()
    load.last(1, **BUSY)
    assert operation.state is OperationState.SUCCEEDED
    assert "attention-1" in members(load.cluster)
    load.last(20, **BUSY)
    assert load.status["wanted"] == {"attention": 2, "expert": 2}
    assert load.status["waits_for"] == ""


def test_activated_slot_time_makes_the_expert_pool_grow() -> None:
    load = Load()
    load.last(40, slot_time=0.9, **BUSY)
    assert load.operation is not None
    assert load.operation.target == "1 attention and 3 expert workers"
    (cause, _) = load.events()[0]
    assert cause.startswith("autoscaling: expert: slot time ")
    assert cause.endswith("%, target 60%, over 30 s")


def test_little_load_makes_it_shrink() -> None:
    load = Load()
    load.last(70, slot_time=0.01, **CALM)
    assert load.operation is not None
    assert load.operation.target == "1 attention and 1 expert worker"


def test_a_dry_run_says_once_what_it_would_do() -> None:
    load = Load("dry-run")
    load.last(120, **QUEUED)
    assert load.operation is None
    assert [effect for _, effect in load.events()] == [
        "would scale to 2 attention and 2 expert workers (dry run)"
    ]
    assert load.status["wanted"] == {"attention": 2, "expert": 2}
    load.last(40, **BUSY)
    assert [effect for _, effect in load.events()][1:] == [
        "would keep 1 attention and 2 expert workers (dry run)"
    ]


def test_no_scaling_begins_while_another_operation_runs() -> None:
    load = Load()
    operation = scale(load.cluster, attention=2)
    load.last(20, **QUEUED)
    assert load.operation is operation
    assert load.status["waits_for"] == f"{operation.id} is under way"


def test_no_scaling_begins_while_workers_are_missing() -> None:
    load = Load()
    load.last(4, **QUEUED)
    load.cluster.disconnect("expert-1")
    load.cluster.answer_loads("expert-0")
    load.cluster.join_all()
    load.last(30, **QUEUED)
    assert load.cluster.state == "DEGRADED"
    assert load.operation is None
    assert load.status["waits_for"] == "the cluster is DEGRADED"
    (name,) = load.cluster.started()
    load.cluster.bring_up(name)
    load.cluster.join_all()
    load.last(8, **QUEUED)
    assert load.operation is not None


def fail(load: Load) -> Operation:
    """The scaling under way loses its new worker."""
    operation = load.operation
    assert operation is not None
    assert operation.is_running
    load.last(1, **QUEUED)
    load.cluster.controller.lost({load.cluster.started()[-1]: "killed"}, load.cluster.now)
    load.last(1, **QUEUED)
    assert operation.state is OperationState.FAILED
    return operation


def test_after_failures_it_waits_longer_and_longer() -> None:
    load = Load()
    load.last(8, **QUEUED)
    for pause_s in (60, 120, 240):
        failed = fail(load)
        load.last(pause_s - 10, **QUEUED)
        assert load.operation is failed
        assert f"after {failed.id} FAILED: attention-1" in load.status["waits_for"]
        load.last(20, **QUEUED)
        assert load.operation is not failed


def test_a_restarted_controller_knows_what_failed() -> None:
    load = Load()
    load.last(8, **QUEUED)
    failed = fail(load)
    other = Load()
    other.cluster.known.operations.restore([failed], other.cluster.now)
    other.last(8, **QUEUED)
    assert other.operation is failed
    other.last(70, **QUEUED)
    assert other.operation is not failed


def test_a_refusal_is_said_once() -> None:
    load = Load()
    load.cluster.known.room = load.cluster.known.num_slots  # as on GPUs: banks cannot grow
    load.last(200, slot_time=0.01, **CALM)
    assert load.operation is None
    ((_, effect),) = load.events()
    assert effect.startswith("could not scale to 1 attention and 1 expert worker: the other")
    assert load.status["wanted"] == {"attention": 1, "expert": 1}
    assert "left after a refusal" in load.status["waits_for"]


def test_no_more_expert_workers_than_experts_of_a_bank() -> None:
    load = Load(max_expert_workers=99)
    load.last(5, **BUSY)
    pools = load.cluster.controller.autoscaling
    assert pools._allowed("expert").max_workers == 8


def test_workers_that_report_no_slot_time_stay() -> None:
    load = Load()
    for record in load.cluster.known.workers.alive():
        record.stats.clear()
    for _ in range(200):
        load.cluster.beat_all()
        load.beat("attention-0", CALM)
        load.cluster.tick(0.5)
    assert load.operation is None
    assert "expert: no use is reported" in load.status["reason"]


@pytest.mark.parametrize("use", [0.9, 0.01])
def test_colocated_workers_are_one_pool(use: float) -> None:
    section = AutoscaleSection(
        autoscale="on", down_s=60.0, min_expert_workers=1, max_expert_workers=4
    )
    workers = WorkersSection(mode="colocated", num_expert_workers=2)
    config = dataclasses.replace(CONFIG, workers=workers, autoscale=section)
    cluster = FakeCluster(0, 2, config=config, pools={"colocated": 2})
    cluster.serve()
    stats = {"num_requests_running": 1.0, "kv_cache_usage_perc": use}
    for _ in range(140):
        for record in list(cluster.known.workers.alive()):
            if not record.is_pending:
                cluster.beat(record.name, stats=stats)
        cluster.tick(0.5)
        if cluster.known.operations.kept:
            break
    (operation,) = cluster.known.operations.kept
    assert operation.target == ("3 colocated workers" if use > 0.5 else "1 colocated worker")


def test_a_refusal_to_shrink_does_not_hold_up_what_grows() -> None:
    load = Load()
    load.cluster.known.room = load.cluster.known.num_slots  # as on GPUs: banks cannot grow
    load.last(62, slot_time=0.01, **CALM)
    assert "left after a refusal" in load.status["waits_for"]
    load.last(8, slot_time=0.01, **QUEUED)
    assert load.operation is not None
    assert load.operation.target == "2 attention and 2 expert workers"
