"""When the controller rebalances, what it reports, and what interrupts it."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from cluster.config.cluster import ClusterConfig
from cluster.config.expert_load import LoadSection, RebalanceSection
from cluster.config.model import ModelSection
from cluster.config.workers import WorkersSection
from cluster.controller.operations import OperationState
from cluster.controller.rebalance_job import RebalanceCommand
from cluster.core.errors import ConflictError
from cluster.core.frames import (
    ControlFrame,
    EpochReady,
    EpochSwitched,
    ExpertsLoaded,
    Heartbeat,
    LoadExperts,
    NewEpoch,
    NewGeneration,
    SwitchEpoch,
)
from cluster.core.load_profile import device_loads
from cluster.core.load_report import BankCounts, LoadReport
from tests.cluster.controller.fakes_cluster import BANKS, FakeCluster
from tests.harness.metric_values import decisions

WINDOW_S = 10.0
EAGER = {"enable_eplb": True, "max_move_fraction": 0.5, "interval_s": 1.0}
SKEWED = (80, 60, 50, 40, 4, 3, 2, 1)
EVEN = (30, 30, 30, 30, 30, 30, 30, 30)


def make(
    num_redundant: int = 2,
    executor: Executor | None = None,
    serves: bool = True,
    **rebalance: Any,
) -> FakeCluster:
    """Four expert workers, that serve if they are to; ``executor`` makes the plans."""
    config = ClusterConfig(
        model=ModelSection(path="x", served_model_name="x"),
        workers=WorkersSection(num_expert_workers=4, num_redundant_experts=num_redundant),
        load=LoadSection(window_s=WINDOW_S),
        rebalance=RebalanceSection(**{**EAGER, **rebalance}),
    )
    cluster = FakeCluster(1, 4, num_redundant=num_redundant, config=config, executor=executor)
    if serves:
        cluster.serve()
    cluster.rows = 0  # type: ignore[attr-defined]
    cluster.counts = np.zeros(8, dtype=np.int64)  # type: ignore[attr-defined]
    return cluster


def window(cluster: FakeCluster, counts: tuple[int, ...]) -> None:
    """A window passes with these numbers of prompt tokens for each expert, in both layers."""
    beat = report(cluster, counts)
    for _ in range(int(WINDOW_S) + 1):
        cluster.send("attention-0", beat)
        cluster.beat_all("attention-0")
        cluster.tick(1.0)


def report(cluster: FakeCluster, counts: tuple[int, ...]) -> Heartbeat:
    """A worker reports these tokens beside those before; its heartbeat."""
    cluster.rows += sum(counts) // 2  # type: ignore[attr-defined]
    cluster.counts = cluster.counts + np.array(counts)  # type: ignore[attr-defined]
    total = cluster.counts  # type: ignore[attr-defined]
    bank = BankCounts(
        prefill=total,
        decode=np.zeros_like(total),
        epoch_prefill=total.reshape(8, 1),
        epoch_decode=np.zeros_like(total),
    )
    epoch = cluster.known.placement.epoch
    banks = {(b.bank, b.layer): bank for b in BANKS}
    load = LoadReport(epoch=epoch, rows=cluster.rows, banks=banks)  # type: ignore[attr-defined]
    beat = Heartbeat(
        progress=0, idle=True, generation=1, running=True, epoch=epoch, expert_load=load
    )
    cluster.send("attention-0", beat)
    return beat


def obey(cluster: FakeCluster) -> int:
    """Workers follow their orders, each frame once; returns the epochs that were switched."""
    switches = 0
    while any(cluster.link.sent.values()):
        for name in tuple(cluster.link.sent):
            for frame in cluster.link.sent.pop(name):
                switches += isinstance(frame, SwitchEpoch)
                answer(cluster, name, frame)
    return switches


def answer(cluster: FakeCluster, name: str, frame: ControlFrame) -> None:
    """What a worker answers at once."""
    match frame:
        case LoadExperts():
            cluster.send(name, ExpertsLoaded(order=frame.order, num_bytes=100))
        case NewEpoch():
            cluster.send(name, EpochReady(generation=frame.generation, epoch=frame.epoch))
        case SwitchEpoch():
            cluster.send(
                name, EpochSwitched(generation=frame.generation, epoch=frame.epoch, step=5)
            )


def status(cluster: FakeCluster) -> dict[str, Any]:
    found: dict[str, Any] = cluster.controller.snapshot()["rebalance"]
    return found


def outcomes(cluster: FakeCluster) -> dict[str, int]:
    """Decisions by how they ended."""
    return decisions(cluster.controller.snapshot())


def test_a_skewed_window_is_answered_and_proved_by_the_next_one() -> None:
    cluster = make()
    before = cluster.known.placement
    window(cluster, SKEWED)
    assert status(cluster)["phase"].startswith("stage 1")
    assert obey(cluster) > 0
    after = cluster.known.placement
    assert after.epoch > before.epoch
    assert after.banks != before.banks
    assert outcomes(cluster) == {"applied": 1}
    last = status(cluster)["last"]
    balance = last["balancedness"]
    assert balance["predicted"] > balance["before"]
    assert balance["achieved"] is None
    (entry,) = [e for e in cluster.controller.snapshot()["history"] if e["cause"] == "rebalance"]
    assert "predicted" in entry["effect"]
    window(cluster, SKEWED)  # had begun before
    assert status(cluster)["last"]["balancedness"]["achieved"] is None
    window(cluster, SKEWED)
    assert status(cluster)["last"]["balancedness"]["achieved"] is not None
    measured = cluster.controller.snapshot()["history"][-1]
    assert measured["cause"] == "rebalance measured"
    assert "in the first window of load of epoch" in measured["effect"]


def test_an_even_load_is_not_worth_it() -> None:
    cluster = make()
    window(cluster, EVEN)
    obey(cluster)
    window(cluster, EVEN)
    window(cluster, EVEN)
    assert outcomes(cluster)["skipped_gain"] >= 2
    assert status(cluster)["phase"] == ""


def test_an_order_that_is_not_worth_it_is_counted_and_a_dry_run_is_not() -> None:
    cluster = make(enable_eplb=False)
    begin = cluster.controller.rebalancing.begin
    window(cluster, EVEN)
    begin(RebalanceCommand(), cluster.now)
    obey(cluster)
    window(cluster, EVEN)
    before = outcomes(cluster).get("skipped_gain", 0)
    for is_dry, counted in ((True, 0), (False, 1)):
        operation = begin(RebalanceCommand(dry_run=is_dry), cluster.now)
        assert operation.result["action"] == "none"
        assert operation.message.startswith("nothing")
        assert outcomes(cluster).get("skipped_gain", 0) == before + counted


def test_changes_keep_their_distance() -> None:
    cluster = make(interval_s=1000.0)
    window(cluster, SKEWED)
    obey(cluster)
    assert outcomes(cluster) == {"skipped_churn": 1}
    assert cluster.known.placement.epoch == 1


def test_without_automation_a_change_waits_for_an_order() -> None:
    cluster = make(enable_eplb=False)
    controller = cluster.controller
    with pytest.raises(ConflictError, match="no load has been recorded"):
        controller.rebalancing.begin(RebalanceCommand(), cluster.now)
    window(cluster, SKEWED)
    assert outcomes(cluster) == {}
    with pytest.raises(ConflictError, match="epoch 1 is in force, not 9"):
        controller.rebalancing.begin(RebalanceCommand(expected_epoch=9), cluster.now)
    dry = controller.rebalancing.begin(RebalanceCommand(dry_run=True), cluster.now)
    assert dry.state is OperationState.SUCCEEDED
    assert dry.result["action"] in ("split", "move")
    assert dry.result["balancedness_predicted"] > dry.result["balancedness_now"]
    assert controller.cluster.placement.epoch == 1
    operation = controller.rebalancing.begin(RebalanceCommand(request_id="a"), cluster.now)
    assert operation.is_running
    assert controller.rebalancing.begin(RebalanceCommand(request_id="a"), cluster.now) is operation
    other = RebalanceCommand(request_id="a", dry_run=True)
    with pytest.raises(ConflictError, match=r"rebalance-1\.2 .* a different operation"):
        controller.rebalancing.begin(other, cluster.now)
    obey(cluster)
    assert operation.state is OperationState.SUCCEEDED
    assert controller.cluster.placement.epoch > 1


def test_an_order_does_what_the_dry_run_before_it_has_shown() -> None:
    """A window that ends between them is another load, though no step has run."""
    cluster = make(enable_eplb=False)
    rebalancing = cluster.controller.rebalancing
    window(cluster, SKEWED)
    report(cluster, (1, 1, 2, 3, 4, 40, 60, 80))
    dry = rebalancing.begin(RebalanceCommand(dry_run=True), cluster.now)
    for _ in range(int(WINDOW_S) + 1):
        cluster.beat_all()
        cluster.tick(1.0)
    order = rebalancing.begin(RebalanceCommand(), cluster.now)
    planned = {**order.result, "dry_run": True}
    assert planned == dry.result
    obey(cluster)
    assert f"by the load of {sum(SKEWED) // 2} rows" in dry.message
    assert f"by the load of {sum(SKEWED) // 2} rows" in order.message
    report(cluster, (1, 1, 2, 3, 4, 40, 60, 80))
    again = rebalancing.begin(RebalanceCommand(dry_run=True), cluster.now)
    assert f"by the load of {sum(SKEWED) // 2} rows" not in again.message


def test_without_spare_slots_it_says_why_not() -> None:
    cluster = make(num_redundant=0)
    window(cluster, SKEWED)
    assert outcomes(cluster) == {}
    assert not status(cluster)["possible"]
    assert "no spare expert slots" in status(cluster)["reason"]
    with pytest.raises(ConflictError, match="no spare expert slots"):
        cluster.controller.rebalancing.begin(RebalanceCommand(), cluster.now)


def test_a_change_can_be_cancelled() -> None:
    cluster = make(enable_eplb=False)
    window(cluster, SKEWED)
    operation = cluster.controller.rebalancing.begin(RebalanceCommand(), cluster.now)
    cluster.controller.rebalancing.cancel(operation, cluster.now)
    assert operation.state is OperationState.CANCELLED
    assert outcomes(cluster) == {"cancelled": 1}
    obey(cluster)
    assert cluster.known.placement.epoch == 1


def test_a_loss_ends_a_change_and_no_epoch_number_comes_twice() -> None:
    cluster = make()
    window(cluster, SKEWED)
    assert status(cluster)["phase"].startswith("stage 1")  # epoch 2
    cluster.disconnect("expert-3")
    cluster.tick(0.2)
    assert outcomes(cluster) == {"failed": 1}
    order = cluster.link.last("expert-0", NewGeneration)
    assert order is not None
    placement = order.placement
    assert placement.epoch == 3
    history = cluster.controller.snapshot()["history"]
    assert any("the epoch in force stays" in e["effect"] for e in history)


def test_an_epoch_without_an_order_leads_to_a_new_generation() -> None:
    """An earlier controller had ordered it: the maps known here are put in force again."""
    cluster = make(enable_eplb=False)
    before = cluster.known.placement
    cluster.send("attention-0", EpochSwitched(generation=1, epoch=6, step=80))
    beat = Heartbeat(progress=1, idle=False, generation=1, running=True, epoch=6)
    cluster.send("attention-0", beat)
    cluster.tick(1.1)
    cluster.send("attention-0", beat)
    assert cluster.known.generation.number == 2
    for member in cluster.known.generation.members:
        cluster.join(member.name, highest_epoch=6)
    order = cluster.link.last("expert-0", NewGeneration)
    assert order is not None
    assert order.placement == replace(before, epoch=7)


def test_the_speeds_that_workers_measure_count() -> None:
    cluster = make(1, enable_eplb=False, serves=False)
    cluster.load_all({f"expert-{i}": {"device_speed": s} for i, s in enumerate((1.5, 1, 1, 1))})
    cluster.join_all()
    assert [m.speed for m in cluster.known.generation.experts] == [
        1.5,
        1.0,
        1.0,
        1.0,
    ]
    window(cluster, EVEN)
    cluster.controller.rebalancing.begin(RebalanceCommand(), cluster.now)
    obey(cluster)
    for bank in cluster.known.placement.banks:
        loads = device_loads(bank, EVEN)
        assert loads[0] == pytest.approx(1.5 * loads[1], rel=0.1)
        assert loads[1:] == pytest.approx((loads[1],) * 3, rel=0.1)


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan"), "fast", None])
def test_a_speed_that_is_none_is_not_believed(speed: object) -> None:
    cluster = make(1, serves=False)
    cluster.load_all({"expert-0": {"device_speed": speed}})
    cluster.join_all()
    assert {m.speed for m in cluster.known.generation.experts} == {1.0}
