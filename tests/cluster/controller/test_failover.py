"""What a restarted controller concludes from the workers' reports."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from cluster.controller.cluster import Cluster
from cluster.controller.controller import Controller
from cluster.controller.controller_memory import ControllerMemory
from cluster.controller.epoch_change import EpochChange
from cluster.controller.failover import CollectedFrames, CollectedState, ReportCollector
from cluster.controller.settings import ControllerSettings
from cluster.core.codec import to_plain
from cluster.core.errors import NotReadyError, ProtocolError
from cluster.core.frames import (
    ControlFrame,
    ControllerSnapshot,
    Heartbeat,
    LoadProgress,
    NewGeneration,
    PeerLost,
    Register,
    Shutdown,
    WorkerReady,
    WorkerReport,
)
from cluster.core.placement import contiguous
from cluster.core.topology import Generation
from cluster.planner.stages import Stage
from tests.cluster.controller.fakes_cluster import (
    BANKS,
    BUILD,
    CONFIG,
    AtOnce,
    FakeCluster,
    FakeWorkerGroup,
    make_members,
    slots_of,
)
from tests.cluster.controller.load_reports import load_of

MEMBERS = make_members(1, 2)
NAMES = [m.name for m in MEMBERS]
PLACEMENT = contiguous(BANKS, 2, 8)
LIMIT_S = 10.0
CONFIRM_S = 0.2


def report_of(number: int = 3, **changes: Any) -> WorkerReport:
    """A worker that runs a generation of all three."""
    generation = Generation(number=number, members=MEMBERS)
    values: dict[str, Any] = {
        "generation": generation,
        "placement": PLACEMENT,
        "running": True,
        "highest_step": 40,
        "highest_epoch": 1,
    }
    return WorkerReport(**(values | changes))


def new_collector() -> ReportCollector:
    return ReportCollector(NAMES, 0.0, limit_s=LIMIT_S, confirm_s=CONFIRM_S)


def call(collector: ReportCollector, name: str, report: WorkerReport, *more: ControlFrame) -> None:
    """Deliver all frames of a worker that calls."""
    (member,) = [m for m in MEMBERS if m.name == name]
    for frame in (Register(member=member), WorkerReady(), report, *more):
        collector.frame(name, frame, 0.1)


def restored(collected: CollectedState) -> tuple[Controller, FakeWorkerGroup]:
    """The controller that this makes."""
    link = FakeWorkerGroup()
    controller = Controller(
        Cluster(
            collected.members,
            collected.placement,
            CONFIG,
            now=1.0,
            term=5,
        ),
        ControllerSettings(),
        AtOnce(),
    )
    link.cluster = controller.cluster
    controller.restore(collected, 1.0)
    return controller, link


def restore(*reports: WorkerReport) -> tuple[Controller, FakeWorkerGroup]:
    """All workers call."""
    collector = new_collector()
    for name, worker_report in zip(NAMES, reports, strict=True):
        call(collector, name, replace(worker_report, slots=slots_of(worker_report, name)))
    assert collector.is_complete(0.1)
    collected = collector.result()
    assert collected is not None
    return restored(collected)


def test_a_whole_generation_goes_on_without_an_order() -> None:
    controller, link = restore(report_of(), report_of(), report_of())
    assert controller.cluster.state.value == "SERVING"
    assert controller.cluster.generation.number == 3
    for name in NAMES:
        (frame,) = link.sent[name]
        assert isinstance(frame, ControllerSnapshot)
        assert frame.term == 5


def test_a_member_that_does_not_run_makes_the_next_generation() -> None:
    controller, link = restore(report_of(), report_of(running=False), report_of())
    order = link.last("expert-1", NewGeneration)
    assert order is not None
    assert order.generation.number == 4
    assert len(order.generation.members) == 3
    assert controller.cluster.state.value == "RECOVERING"


def test_the_newest_generation_counts() -> None:
    """The controller died before it informed the others."""
    smaller = Generation(number=4, members=MEMBERS[:2])
    newer = report_of(4, generation=smaller, running=False)
    controller, link = restore(newer, report_of(), report_of())
    order = link.last("expert-0", NewGeneration)
    assert order is not None
    assert order.generation.number == 5
    assert [m.name for m in order.generation.members] == ["attention-0", "expert-0"]
    assert link.last("expert-1", NewGeneration) is None
    assert len(list(controller.cluster.workers)) == 3


def test_a_worker_that_does_not_call_is_lost_after_the_limit() -> None:
    collector = new_collector()
    for name in NAMES[:2]:
        call(collector, name, report_of())
    assert not collector.is_complete(LIMIT_S - 0.1)
    assert collector.is_complete(LIMIT_S)
    collected = collector.result()
    assert collected is not None
    controller, link = restored(collected)
    states = {w["name"]: w["state"] for w in controller.snapshot()["workers"]}
    assert states["expert-1"] == "LOST"
    assert link.ended == ["expert-1"]
    order = link.last("attention-0", NewGeneration)
    assert order is not None
    assert order.placement.epoch == 2


def collector_without_expert_1() -> ReportCollector:
    """The others have called, at 0.1 s, and one of them has lost it."""
    collector = new_collector()
    blame = PeerLost(worker="expert-1", generation=3, reason="reset")
    call(collector, "attention-0", report_of(running=False), blame)
    call(collector, "expert-0", report_of())
    return collector


def test_the_wait_for_a_worker_that_a_peer_lost_is_short() -> None:
    collector = collector_without_expert_1()
    assert not collector.is_complete(0.1 + 5 * CONFIRM_S - 0.01)
    assert collector.is_complete(0.1 + 5 * CONFIRM_S + 0.01)
    assert 5 * CONFIRM_S < LIMIT_S


def test_a_worker_that_a_peer_lost_may_get_a_second_call() -> None:
    """The first one, and Ray's answer that it is lost, take longer than ``confirm_s``."""
    collector = collector_without_expert_1()
    assert not collector.is_complete(0.1 + 2 * CONFIRM_S)
    call(collector, "expert-1", report_of(running=False))
    assert collector.is_complete(0.1 + 2 * CONFIRM_S)
    collected = collector.result()
    assert collected is not None
    assert sorted(collected.frames_by_worker) == sorted(NAMES)


def test_a_worker_that_a_peer_lost_and_that_ended_is_not_waited_for() -> None:
    collector = collector_without_expert_1()
    collector.gone("expert-1", 0.1)
    assert not collector.is_complete(0.1 + CONFIRM_S - 0.01)
    assert collector.is_complete(0.1 + CONFIRM_S + 0.01)


def test_a_member_that_loses_a_peer_after_its_report_makes_the_next_generation() -> None:
    collector = new_collector()
    for name in NAMES:
        call(collector, name, report_of())
    blame = PeerLost(worker="expert-1", generation=3, reason="reset")
    collector.frame("attention-0", blame, 0.2)
    collected = collector.result()
    assert collected is not None
    controller, _ = restored(collected)
    assert controller.cluster.generation.number == 4


def test_who_has_lost_its_connection_may_call_again() -> None:
    collector = new_collector()
    for name in NAMES:
        call(collector, name, report_of())
    collector.gone("expert-1", 0.1)
    assert not collector.is_complete(0.1)
    call(collector, "expert-1", report_of())
    assert collector.is_complete(0.1)
    collected = collector.result()
    assert collected is not None
    assert collected.is_intact


def test_whose_process_ended_is_not_waited_for() -> None:
    collector = new_collector()
    call(collector, "attention-0", report_of())
    call(collector, "expert-0", report_of())
    call(collector, "expert-1", report_of())
    collector.gone("expert-1", 0.1)
    assert collector.is_complete(0.1 + CONFIRM_S)
    collected = collector.result()
    assert collected is not None
    assert not collected.is_intact


def test_a_start_that_never_served_is_not_restored() -> None:
    collector = new_collector()
    for name in NAMES:
        call(collector, name, report_of(generation=None, placement=None, running=False))
    assert collector.result() is None


def test_workers_that_nobody_has_heard_in_time_may_serve() -> None:
    assert new_collector().is_complete(LIMIT_S)
    with pytest.raises(NotReadyError, match="no report of attention-0, expert-0, expert-1"):
        new_collector().result()


def test_a_worker_that_never_called_a_controller_had_no_generation() -> None:
    fresh = report_of(generation=None, placement=None, running=False)
    collector = ReportCollector(
        NAMES, 0.0, limit_s=LIMIT_S, confirm_s=CONFIRM_S, fresh=["attention-0"]
    )
    for name in NAMES[1:]:
        call(collector, name, fresh)
    assert collector.is_complete(LIMIT_S)
    assert collector.result() is None


def test_a_worker_that_was_never_in_a_generation_says_nothing_about_the_others() -> None:
    fresh = report_of(generation=None, placement=None, running=False)
    collector = ReportCollector(
        NAMES[2:], 0.0, limit_s=LIMIT_S, confirm_s=CONFIRM_S, known=NAMES[:2]
    )
    call(collector, "expert-1", fresh)
    assert collector.is_complete(0.1)
    with pytest.raises(NotReadyError, match="no report of attention-0, expert-0"):
        collector.result()


def test_nobody_waits_for_a_worker_that_has_never_called() -> None:
    """The controller may have been lost before it told it to start; it is ended then."""
    names = [*NAMES, "expert-1.2"]
    collector = ReportCollector(
        names, 0.0, limit_s=LIMIT_S, confirm_s=CONFIRM_S, fresh=["expert-1.2"]
    )
    for name in NAMES:
        assert not collector.is_complete(0.1)
        call(collector, name, report_of())
    assert collector.is_complete(0.1)


def test_the_newest_memory_counts_and_names_the_lost_workers() -> None:
    entry = {"generation": 3, "time": 5.0, "cause": "lost expert-9: gone", "effect": "go on"}
    lost = make_members(1, 10)[-1]
    memory = {
        "version": 7,
        "history": [entry],
        "lost": [{"member": to_plain(lost), "state": "LOST", "reason": "gone"}],
    }
    old = {"version": 6, "history": [], "lost": []}
    controller, link = restore(report_of(memory=old), report_of(memory=memory), report_of())
    snapshot = controller.snapshot()
    assert snapshot["history"][0]["cause"] == "lost expert-9: gone"
    assert {w["name"]: w["reason"] for w in snapshot["workers"]}["expert-9"] == "gone"
    controller.frame("expert-9", Heartbeat(progress=1, idle=True, generation=3), 2.0)
    assert link.sent["expert-9"] == [Shutdown(reason="gone")]


def test_who_joins_the_first_generation_keeps_what_the_cluster_was_started_with() -> None:
    """Its controller may be lost before the generation runs."""
    cluster = FakeCluster()
    cluster.load_all()
    snapshot, order = cluster.link.sent["attention-0"]
    assert isinstance(snapshot, ControllerSnapshot)
    assert isinstance(order, NewGeneration)
    unrun = report_of(1, running=False, memory=snapshot.memory)
    collector = new_collector()
    for name in NAMES:
        call(collector, name, unrun)
    collected = collector.result()
    assert collected is not None
    assert collected.memory.notes == cluster.known.notes
    controller, _ = restored(collected)
    assert controller.snapshot()["history"][0]["cause"] == "start"


def test_the_names_of_workers_that_left_long_ago_are_not_given_again() -> None:
    cluster = FakeCluster()
    cluster.known.places.add(["expert-2"])
    cluster.known.places.take_due(0.0)
    cluster.known.places.remove(["expert-2"])
    report = report_of(memory=to_plain(cluster.known.memory()))
    controller, _ = restore(report, report, report)
    places = controller.cluster.places
    assert places.names() == tuple(NAMES)
    places.add(["expert-2"])
    assert [member.name for member in places.take_due(0.0)] == ["expert-2.2"]


def test_load_that_an_earlier_controller_has_counted_is_no_load_window() -> None:
    controller, _ = restore(report_of(), report_of(), report_of())
    load = controller.cluster.load
    load.take("attention-0", load_of(1000, [900, 100]))
    assert load.tick(100.0) is None
    assert load.totals().rows == 1000


def test_strangers_are_refused_and_other_frames_ignored() -> None:
    collector = new_collector()
    with pytest.raises(ProtocolError, match="expert-7 is no worker of this cluster"):
        collector.frame("expert-7", WorkerReady(), 0.0)
    collector.frame("expert-0", LoadProgress(loaded_bytes=1, total_bytes=2), 0.0)
    collector.frame("expert-0", Heartbeat(progress=1, idle=True, generation=3), 0.0)
    assert not collector.is_complete(0.1)


def test_a_replacement_that_became_ready_meanwhile_joins_a_stalled_cluster() -> None:
    """The only attention worker was lost; its replacement loaded while no controller was there."""
    replacement = replace(MEMBERS[0], name="attention-0.2")
    names = ["attention-0.2", *NAMES[1:]]
    collector = ReportCollector(names, 0.0, limit_s=LIMIT_S, confirm_s=CONFIRM_S)
    fresh = report_of(generation=None, placement=None, running=False, highest_step=0)
    for frame in (Register(member=replacement), WorkerReady(), fresh):
        collector.frame(replacement.name, frame, 0.1)
    for name in NAMES[1:]:
        call(collector, name, report_of(running=False))
    collected = collector.result()
    assert collected is not None
    _, link = restored(collected)
    order = link.last("expert-0", NewGeneration)
    assert order is not None
    assert {m.name for m in order.generation.members} == set(names)


def test_a_member_without_the_experts_of_the_maps_loads_them_before_it_goes_on() -> None:
    """It says that it runs the generation; what its slots hold is no less a fact."""
    collector = new_collector()
    for name in NAMES:
        report = report_of()
        held = () if name == "expert-1" else slots_of(report, name)
        call(collector, name, replace(report, slots=held))
    collected = collector.result()
    assert collected is not None
    controller, link = restored(collected)
    assert controller.cluster.state.value == "RECOVERING"
    order = link.last("expert-1", NewGeneration)
    assert order is not None
    assert order.generation.number == 4


HOSTS = {"attention-0": "here", "expert-0": "h-1", "expert-1": "h-2"}


@pytest.mark.parametrize(
    ("called", "alive", "unheard"),
    [
        ([], NAMES, NAMES[1:]),
        (NAMES[:1], NAMES, NAMES[1:]),
        (NAMES[:1], NAMES[:2], []),  # Ray knows of one death: the other one may have died as well
        (NAMES[:2], NAMES, []),
        (NAMES, NAMES, []),
    ],
)
def test_the_silence_of_most_other_hosts_may_be_that_of_the_controllers(
    called: list[str], alive: list[str], unheard: list[str]
) -> None:
    members = tuple(replace(m, node=HOSTS[m.name]) for m in MEMBERS)
    collected = CollectedState(
        generation=Generation(number=3, members=members),
        placement=PLACEMENT,
        frames_by_worker=dict.fromkeys(called, CollectedFrames()),
        memory=ControllerMemory(),
    )
    assert sorted(collected.silent_members("here", alive)) == unheard
    assert not collected.silent_members("", []), "nobody lives"


@pytest.mark.parametrize("checkpoint", [BUILD.checkpoint_id, "another"])
def test_a_worker_of_another_build_meets_no_member_at_a_restarted_controller(
    checkpoint: str,
) -> None:
    """It has registered with a controller that was lost before it could refuse it."""
    fresh = replace(MEMBERS[0], name="attention-0.2")
    names = [fresh.name, *NAMES[1:]]
    collector = ReportCollector(names, 0.0, limit_s=LIMIT_S, confirm_s=CONFIRM_S)
    theirs = report_of(running=False)
    for member, known, report in (
        (fresh, checkpoint, report_of(generation=None, placement=None, running=False)),
        *((member, BUILD.checkpoint_id, theirs) for member in MEMBERS[1:]),
    ):
        build = replace(BUILD, checkpoint_id=known)
        for frame in (Register(member=member, build=build), WorkerReady(), report):
            collector.frame(member.name, frame, 0.1)
    collected = collector.result()
    assert collected is not None
    _, link = restored(collected)
    fits = checkpoint == BUILD.checkpoint_id
    assert (link.last(fresh.name, NewGeneration) is not None) == fits
    assert (fresh.name in link.ended) != fits


def test_a_new_term_numbers_its_epochs_above_all_that_workers_know() -> None:
    """An epoch that was announced and never ran has maps of its own at the workers."""
    controller, _ = restore(report_of(), report_of(known_epoch=7), report_of())
    stage = Stage(fills=(), placement=controller.cluster.placement)
    change = EpochChange(controller.cluster, stage, 1.0)
    assert change.stage.placement.epoch == 8
