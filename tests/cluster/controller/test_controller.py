"""The controller's state machine with fake workers and a clock moved by hand."""

from __future__ import annotations

import math
import random

import pytest
from msgspec.structs import replace

from benchmarks.harness.members import member_of
from cluster.controller.controller import CALL_AGAIN_S
from cluster.controller.settings import ControllerSettings
from cluster.core.errors import DuplicateRegistrationError, ProtocolError
from cluster.core.frames import (
    ControlFrame,
    ControlHello,
    GenerationReady,
    Heartbeat,
    HeartbeatAck,
    LoadProgress,
    NewGeneration,
    PeerLost,
    Register,
    RunGeneration,
    Shutdown,
    StatusReply,
    StatusRequest,
    WorkerFailed,
    WorkerReady,
    WorkerReport,
)
from cluster.core.states import IllegalTransitionError
from tests.cluster.controller.fakes_cluster import FakeCluster
from tests.cluster.controller.load_reports import load_of, make_report
from tests.harness.tiers import quick_rows

pytestmark = pytest.mark.heavy

STATES = {"STARTING", "SERVING", "DEGRADED", "RECOVERING", "DRAINING", "STOPPED"}


def _states(cluster: FakeCluster) -> dict[str, str]:
    return {w["name"]: w["state"] for w in cluster.controller.snapshot()["workers"]}


# ---- start ----------------------------------------------------------------------------------


def test_a_start_goes_from_register_to_serving() -> None:
    cluster = FakeCluster(2, 2)
    assert cluster.state == "STARTING"
    cluster.load_all()
    assert cluster.state == "STARTING"
    order = cluster.link.last("expert-1", NewGeneration)
    assert order is not None
    generation = order.generation
    assert generation.number == 1
    assert [m.data_address for m in generation.members] == [
        f"10.0.0.1:{1000 + i}" for i in range(4)
    ]
    assert order.placement == cluster.placement
    for name in ("attention-0", "attention-1", "expert-0"):
        cluster.join(name)
        assert cluster.running() == {}
    cluster.join("expert-1")
    assert cluster.state == "SERVING"
    assert set(cluster.running()) == {m.name for m in cluster.members}
    assert {order.first_step for order in cluster.running().values()} == {1}
    assert set(_states(cluster).values()) == {"SERVING"}


def test_a_worker_may_register_on_its_second_connection() -> None:
    cluster = FakeCluster()
    cluster.load_all()
    report = WorkerReport(
        generation=None, placement=None, running=False, highest_step=0, highest_epoch=0
    )
    cluster.send("expert-0", report)
    cluster.join_all()
    assert cluster.state == "SERVING"
    order = cluster.link.last("expert-0", NewGeneration)
    assert order is not None
    with pytest.raises(ProtocolError, match="expert-0 sent WorkerReport"):
        cluster.send("expert-0", replace(report, generation=order.generation))


def test_the_first_generation_waits_for_the_last_worker() -> None:
    cluster = FakeCluster()
    for member in cluster.members:
        cluster.register(member.name)
    for name in ("attention-0", "expert-0"):
        cluster.send(name, WorkerReady())
    assert cluster.link.last("attention-0", NewGeneration) is None


def test_the_snapshot_has_the_documented_form() -> None:
    cluster = FakeCluster()
    cluster.register("attention-0", pid=42)
    cluster.send("attention-0", LoadProgress(loaded_bytes=5, total_bytes=20))
    snapshot = cluster.controller.snapshot()
    assert snapshot["schema"] == 1
    assert snapshot["model"] == {
        "model_type": None,
        "dtype": None,
        "kv_cache_dtype": None,
        "max_model_len": None,
        "vocab_size": None,
        "name": "demo",
        "path": "somewhere",
    }
    assert not snapshot["experts_complete"]
    worker = snapshot["workers"][0]
    assert worker["name"] == "attention-0"
    assert (worker["role"], worker["rank"], worker["pid"]) == ("attention", 0, 42)
    assert (worker["loaded_bytes"], worker["total_bytes"]) == (5, 20)
    assert worker["state"] == "LOADING"
    assert worker["kv_usage"] is None


def test_model_facts_come_from_the_attention_workers() -> None:
    cluster = FakeCluster()
    cluster.serve()
    model = cluster.controller.snapshot()["model"]
    assert model["max_model_len"] == 128
    assert model["vocab_size"] == 50


def test_a_worker_that_fails_ends_the_start_in_its_own_words() -> None:
    cluster = FakeCluster()
    cluster.register("attention-0")
    cluster.send("attention-0", WorkerFailed(reason="tensor lm_head: [5, 4], not [4, 5]"))
    snapshot = cluster.controller.snapshot()
    assert snapshot["error"] == "attention-0: tensor lm_head: [5, 4], not [4, 5]"
    assert snapshot["state"] == "DRAINING"
    assert cluster.link.all_ended_asked == 1
    assert cluster.link.last("expert-0", Shutdown) is not None
    cluster.controller.all_ended(cluster.now)
    assert cluster.state == "STOPPED"
    assert set(_states(cluster).values()) == {"LOST"}


def test_the_first_error_of_a_start_is_kept() -> None:
    cluster = FakeCluster()
    cluster.controller.lost({"expert-0": "out of memory"}, cluster.now)
    cluster.disconnect("attention-0")
    assert cluster.known.error == "expert-0: out of memory"
    assert cluster.link.all_ended_asked == 1


def test_a_start_has_a_limit() -> None:
    cluster = FakeCluster(settings=ControllerSettings(start_limit_s=3.0))
    cluster.register("expert-0")
    cluster.send("expert-0", WorkerReady())
    cluster.tick(2.9)
    assert cluster.state == "STARTING"
    cluster.tick(0.3)
    assert cluster.known.error == (
        "attention-0: not ready within 3 s (STARTING, 0 of 0 bytes); "
        "expert-1: not ready within 3 s (STARTING, 0 of 0 bytes)"
    )


def test_loading_workers_may_be_silent_for_longer() -> None:
    cluster = FakeCluster()
    cluster.load_all()
    cluster.tick(10.0)
    assert cluster.state == "STARTING"
    cluster = FakeCluster()
    cluster.register("expert-0")
    cluster.tick(31.0)
    assert cluster.known.error == "expert-0: no sign of life for 30.1 s (limit 30 s)"


def test_a_member_that_does_not_join_the_first_generation_fails_the_start() -> None:
    cluster = FakeCluster(settings=ControllerSettings(generation_limit_s=5.0))
    cluster.load_all()
    cluster.join("attention-0")
    cluster.join("expert-0")
    cluster.tick(5.2)
    assert cluster.known.error == "expert-1: did not join generation 1 within 5 s"


def test_an_edge_that_cannot_be_opened_fails_the_start() -> None:
    cluster = FakeCluster()
    cluster.load_all()
    lost = PeerLost(worker="expert-1", generation=1, reason="connection refused")
    cluster.send("attention-0", lost)
    cluster.tick(0.3)
    assert cluster.known.error == "expert-1: attention-0 reports: connection refused"


# ---- losses ---------------------------------------------------------------------------------


def test_a_killed_expert_worker_costs_one_generation() -> None:
    cluster = FakeCluster(2, 3, num_redundant=3)
    cluster.serve()
    cluster.disconnect("expert-1")
    assert cluster.state == "RECOVERING"
    assert cluster.link.ended == ["expert-1"]
    assert _states(cluster)["expert-1"] == "LOST"
    assert _states(cluster)["expert-0"] == "READY"
    order = cluster.link.last("attention-0", NewGeneration)
    assert order is not None
    assert order.generation.number == 2
    assert order.placement.epoch == 2
    cluster.now += 0.03
    for step, member in enumerate(cluster.known.generation.members, start=40):
        cluster.join(member.name, highest_step=step)
    assert cluster.state == "DEGRADED"
    running = cluster.running()
    assert {running[n].first_step for n in ("attention-0", "attention-1", "expert-0")} == {44}
    assert running["expert-1"].generation == 1
    snapshot = cluster.controller.snapshot()
    assert snapshot["experts_complete"]
    assert snapshot["generation"] == 2
    assert snapshot["placement_epoch"] == 2
    entry = snapshot["history"][-1]
    assert entry["generation"] == 2
    assert entry["time"] == 1_000_100.0
    assert entry["cause"] == "lost expert-1: its control connection closed (reset)"
    assert entry["effect"] == (
        "continue with 2 attention and 2 expert workers, placement epoch 2; "
        "runs from step 44 after 0.030 s"
    )


def test_a_loss_during_recovery_starts_the_next_generation() -> None:
    cluster = FakeCluster(1, 3, num_redundant=5)
    cluster.serve()
    cluster.disconnect("expert-1")
    cluster.join("attention-0", highest_step=7)
    cluster.disconnect("expert-2")
    assert cluster.state == "RECOVERING"
    cluster.join_all(highest_step=7)
    assert cluster.state == "DEGRADED"
    snapshot = cluster.controller.snapshot()
    assert snapshot["generation"] == 3
    assert snapshot["placement_epoch"] == 3
    assert cluster.running()["attention-0"] == RunGeneration(generation=3, first_step=8)


def test_an_answer_to_an_older_generation_does_not_count() -> None:
    cluster = FakeCluster(1, 3, num_redundant=5)
    cluster.serve()
    cluster.disconnect("expert-1")
    late = GenerationReady(generation=1, highest_step=3, highest_epoch=1)
    for name in ("attention-0", "expert-0", "expert-2"):
        cluster.send(name, late)
    assert cluster.state == "RECOVERING"


def test_a_survivor_with_a_higher_epoch_raises_everybodys() -> None:
    cluster = FakeCluster(1, 3, num_redundant=5)
    cluster.serve()
    cluster.disconnect("expert-1")
    cluster.join("attention-0", highest_epoch=9)
    cluster.join("expert-0")
    cluster.join("expert-2")
    assert cluster.state == "RECOVERING"
    order = cluster.link.last("expert-0", NewGeneration)
    assert order is not None
    assert order.placement.epoch == 10
    assert order.generation.number == 3
    cluster.join_all()
    assert cluster.state == "DEGRADED"


def test_a_lost_attention_worker_keeps_the_epoch() -> None:
    cluster = FakeCluster(2, 2)
    cluster.serve()
    cluster.disconnect("attention-0")
    cluster.join_all()
    snapshot = cluster.controller.snapshot()
    assert snapshot["state"] == "DEGRADED"
    assert snapshot["placement_epoch"] == 1
    assert cluster.known.generation.leader.name == "attention-1"


def test_without_copies_and_room_nothing_runs_and_the_state_says_so() -> None:
    cluster = FakeCluster(1, 2, can_grow=False)
    cluster.serve()
    cluster.disconnect("expert-0")
    snapshot = cluster.controller.snapshot()
    assert snapshot["state"] == "RECOVERING"  # a new worker will be started
    assert not snapshot["experts_complete"]
    assert snapshot["generation"] == 1
    assert snapshot["history"][-1]["effect"].startswith("8 experts have no copy left")
    assert _states(cluster)["attention-0"] == "READY"
    for _ in range(60):  # the survivors stall, which is no failure
        cluster.tick(0.5)
        for name in ("attention-0", "expert-1"):
            cluster.beat(name, idle=False)
    assert _states(cluster)["attention-0"] == "READY"


def test_a_second_loss_while_incomplete_stays_incomplete() -> None:
    cluster = FakeCluster(1, 4, num_redundant=2, can_grow=False)
    cluster.serve()
    cluster.controller.lost({"expert-0": "gone", "expert-1": "gone"}, cluster.now)
    assert not cluster.controller.snapshot()["experts_complete"]
    cluster.controller.lost({"expert-3": "gone"}, cluster.now)
    snapshot = cluster.controller.snapshot()
    assert not snapshot["experts_complete"]
    assert snapshot["state"] == "RECOVERING"


def test_the_last_attention_worker_is_missed() -> None:
    cluster = FakeCluster()
    cluster.serve()
    cluster.disconnect("attention-0")
    snapshot = cluster.controller.snapshot()
    assert snapshot["state"] == "RECOVERING"
    assert snapshot["experts_complete"]
    assert snapshot["history"][-1]["effect"] == "no attention worker is left"


# ---- detection ------------------------------------------------------------------------------


def test_a_frozen_worker_is_lost_after_the_limit() -> None:
    cluster = FakeCluster(1, 3, num_redundant=5)
    cluster.serve()
    for _ in range(4):
        cluster.tick(0.5)
        cluster.beat_all("expert-2")
    assert cluster.state == "SERVING"
    cluster.tick(0.2)
    assert cluster.state == "RECOVERING"
    assert _states(cluster)["expert-2"] == "LOST"
    assert _states(cluster)["expert-1"] == "READY"


def test_a_stuck_loop_under_a_live_heartbeat_is_lost() -> None:
    cluster = FakeCluster(1, 3, num_redundant=5)
    cluster.serve()
    for progress in range(5):
        cluster.tick(0.5)
        cluster.beat("attention-0", progress=3, idle=False, waiting=True)
        cluster.beat("expert-0", progress=progress, idle=False)
        cluster.beat("expert-1", progress=8, idle=False)
        cluster.beat("expert-2", progress=0, idle=True)
    cluster.tick(0.1)
    reasons = {w["name"]: w["reason"] for w in cluster.controller.snapshot()["workers"]}
    assert reasons.pop("expert-1").startswith("its loop has stalled for 2.1 s")
    assert set(reasons.values()) == {""}


def test_a_paused_controller_declares_no_worker_lost() -> None:
    cluster = FakeCluster()
    cluster.serve()
    cluster.beat_all()
    cluster.now += 30.0
    cluster.controller.tick(cluster.now)
    assert cluster.state == "SERVING"
    cluster.tick(2.3)
    assert {_states(cluster)[m.name] for m in cluster.members} == {"LOST"}


def test_a_heartbeat_renews_the_lease() -> None:
    cluster = FakeCluster()
    cluster.serve()
    cluster.beat("expert-0")
    assert cluster.link.sent["expert-0"][-1] == HeartbeatAck(term=1)


def test_a_report_alone_is_acted_on_after_the_confirm_time() -> None:
    cluster = FakeCluster(1, 3, num_redundant=5)
    cluster.serve()
    cluster.send("attention-0", PeerLost(worker="expert-1", generation=1, reason="reset"))
    cluster.tick(0.1)
    assert cluster.state == "SERVING"
    cluster.tick(0.2)
    assert cluster.state == "RECOVERING"
    assert _states(cluster)["expert-1"] == "LOST"
    shutdown = cluster.link.last("expert-1", Shutdown)
    assert shutdown is not None
    assert shutdown.reason == "declared lost: attention-0 reports: reset"


def test_the_only_attention_worker_survives_the_report_of_one_expert_worker() -> None:
    """The path between the two is bad, and what went the other way had arrived before."""
    cluster = FakeCluster(1, 3, num_redundant=8)
    cluster.serve()
    cluster.send("expert-1", PeerLost(worker="attention-0", generation=1, reason="silent"))
    cluster.tick(0.3)
    assert cluster.link.ended == ["expert-1"]
    cluster.join_all()
    assert cluster.state == "DEGRADED"


def test_an_attention_worker_is_lost_rather_than_the_only_copies_of_experts() -> None:
    cluster = FakeCluster(2, 2)
    cluster.serve()
    cluster.send("attention-1", PeerLost(worker="expert-1", generation=1, reason="silent"))
    cluster.tick(0.3)
    assert cluster.link.ended == ["attention-1"]


def test_a_report_by_a_worker_that_is_lost_itself_is_dropped() -> None:
    cluster = FakeCluster(1, 3, num_redundant=5)
    cluster.serve()
    cluster.send("expert-0", PeerLost(worker="attention-0", generation=1, reason="reset"))
    cluster.disconnect("expert-0")
    cluster.join_all()
    cluster.beat_all()
    cluster.tick(1.0)
    assert _states(cluster)["attention-0"] == "SERVING"


def test_a_report_of_an_older_generation_is_dropped() -> None:
    cluster = FakeCluster(1, 3, num_redundant=5)
    cluster.serve()
    cluster.disconnect("expert-0")
    cluster.join_all()
    cluster.send("attention-0", PeerLost(worker="expert-1", generation=1, reason="late"))
    cluster.tick(1.0)
    assert _states(cluster)["expert-1"] == "SERVING"


def test_a_lost_worker_that_speaks_again_is_ordered_to_end() -> None:
    cluster = FakeCluster(1, 3, num_redundant=5)
    cluster.serve()
    cluster.controller.lost({"expert-0": "no heartbeat"}, cluster.now)
    cluster.link.sent["expert-0"].clear()
    cluster.beat("expert-0")
    assert cluster.link.sent["expert-0"] == [Shutdown(reason="no heartbeat")]


# ---- what does not belong -------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        ControlHello(worker="expert-0", nonce="x"),
        RunGeneration(generation=1, first_step=1),
        Register(member=member_of("expert-1")),
        WorkerReady(),
        PeerLost(worker="nobody", generation=0, reason="x"),
    ],
    ids=lambda f: type(f).__name__,
)
def test_a_frame_out_of_place_is_a_protocol_error(frame: ControlFrame) -> None:
    cluster = FakeCluster()
    with pytest.raises(ProtocolError):
        cluster.send("expert-0", frame)
    assert cluster.state == "STARTING"


def test_a_stranger_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError, match="expert-9 is no worker of this cluster"):
        FakeCluster().beat("expert-9")


def test_a_known_worker_that_registers_again_is_refused_as_such() -> None:
    """Frames may be lost: only the reports of all workers tell what is so."""
    cluster = FakeCluster()
    cluster.register("expert-0")
    with pytest.raises(DuplicateRegistrationError, match="registers again"):
        cluster.register("expert-0")


def test_a_worker_without_connection_has_a_moment_to_call_again() -> None:
    cluster = FakeCluster()
    cluster.serve()
    cluster.controller.disconnected("expert-0", "reset", False, cluster.now)
    cluster.tick(CALL_AGAIN_S / 2)
    assert cluster.state == "SERVING"
    cluster.tick(CALL_AGAIN_S)
    assert cluster.state == "RECOVERING"
    record = cluster.known.workers["expert-0"]
    assert record.reason == "its control connection closed (reset)"


def test_a_worker_that_calls_again_before_it_has_registered_is_not_lost() -> None:
    cluster = FakeCluster()
    cluster.controller.disconnected("expert-0", "reset", False, cluster.now)
    cluster.tick(CALL_AGAIN_S / 2)
    nothing = WorkerReport(
        generation=None, placement=None, running=False, highest_step=0, highest_epoch=0
    )
    cluster.send("expert-0", nothing)
    cluster.tick(CALL_AGAIN_S)
    cluster.serve()


@pytest.mark.parametrize("is_reported_first", [True, False])
def test_a_worker_without_connection_that_a_peer_has_lost_is_lost_at_once(
    is_reported_first: bool,
) -> None:
    cluster = FakeCluster()
    cluster.serve()
    report = PeerLost(worker="expert-0", generation=1, reason="closed by the peer")
    if is_reported_first:
        cluster.send("attention-0", report)
    assert cluster.state == "SERVING"
    cluster.controller.disconnected("expert-0", "reset", False, cluster.now)
    if not is_reported_first:
        assert cluster.state == "SERVING"
        cluster.send("attention-0", report)
    assert cluster.known.workers["expert-0"].is_lost


def test_a_worker_that_has_sent_an_invalid_frame_is_lost_at_once() -> None:
    cluster = FakeCluster()
    cluster.serve()
    cluster.controller.disconnected("expert-0", "not a frame", True, cluster.now)
    assert cluster.known.workers["expert-0"].is_lost


# ---- status and stop ------------------------------------------------------------------------


def test_a_fresh_status_asks_every_worker() -> None:
    cluster = FakeCluster(2, 1)
    cluster.serve()
    cluster.controller.request_status(cluster.now)
    request = cluster.link.last("attention-0", StatusRequest)
    assert request is not None
    stats = {"kv_blocks_free": 30.0, "kv_blocks_total": 40.0, "odd": math.nan}
    reply = StatusReply(token=request.token, stats=stats, expert_load=load_of(1, [1, 2]))
    cluster.send("attention-0", reply)
    assert not cluster.known.workers.status_complete
    cluster.send("attention-1", StatusReply(token=request.token, expert_load=load_of(5, [5, 5])))
    cluster.send("expert-0", StatusReply(token=request.token))
    assert cluster.known.workers.status_complete
    worker = cluster.controller.snapshot()["workers"][0]
    assert (worker["kv_blocks_free"], worker["kv_blocks_total"]) == (30, 40)
    assert worker["kv_usage"] == 0.25
    assert worker["stats"] == {"kv_blocks_free": 30.0, "kv_blocks_total": 40.0}
    totals = cluster.known.load.totals()
    assert totals.rows == 6
    assert totals.counts(("mlp", 0)).tolist() == [6, 7]


def test_a_lost_worker_is_not_waited_for() -> None:
    cluster = FakeCluster(1, 1)
    cluster.serve()
    cluster.controller.request_status(cluster.now)
    request = cluster.link.last("attention-0", StatusRequest)
    assert request is not None
    cluster.send("attention-0", StatusReply(token=request.token))
    cluster.disconnect("expert-0")
    assert cluster.known.workers.status_complete


def test_stop_ends_everything_once() -> None:
    cluster = FakeCluster()
    cluster.serve()
    version = cluster.known.version
    cluster.controller.stop(cluster.now)
    cluster.controller.stop(cluster.now)
    assert cluster.state == "DRAINING"
    assert cluster.known.version > version
    assert cluster.link.all_ended_asked == 1
    cluster.disconnect("expert-0", "closed")
    cluster.controller.all_ended(cluster.now)
    assert cluster.state == "STOPPED"
    assert cluster.known.error is None
    cluster.tick(10.0)
    assert cluster.state == "STOPPED"


# ---- anything, in any order -----------------------------------------------------------------


def _random_event(cluster: FakeCluster, draw: random.Random) -> None:
    name = draw.choice(cluster.members).name
    number = cluster.known.generation.number + draw.choice([-1, 0, 0, 0, 0])
    other = draw.choice(cluster.members).name
    frames: list[ControlFrame] = [
        WorkerReady(),
        LoadProgress(loaded_bytes=1, total_bytes=2),
        Heartbeat(progress=draw.randint(0, 2), idle=draw.random() < 0.5, generation=number),
        PeerLost(worker=other, generation=number, reason="reset"),
        StatusReply(token=draw.randint(0, 3)),
        *[GenerationReady(generation=number, highest_step=draw.randint(0, 9), highest_epoch=1)] * 4,
    ]
    kind = draw.random()
    if kind < 0.06:
        cluster.disconnect(name)
    elif kind < 0.08:
        cluster.controller.request_status(cluster.now)
    elif kind < 0.083:
        cluster.controller.stop(cluster.now)
    elif kind < 0.09:
        cluster.controller.all_ended(cluster.now) if cluster.state == "DRAINING" else None
    elif kind < 0.3:
        cluster.tick(draw.choice([0.1, 0.3, 1.0]))
    elif kind < 0.5:
        cluster.beat_all()
    elif kind < 0.6:
        cluster.register(name)
    else:
        cluster.send(name, draw.choice(frames))


def _check_consistent(cluster: FakeCluster, before: tuple[int, int, int]) -> tuple[int, int, int]:
    """Invariants of every snapshot; returns what must never go back."""
    snapshot = cluster.controller.snapshot()
    workers = {w["name"]: w["state"] for w in snapshot["workers"]}
    serving = {n for n, s in workers.items() if s == "SERVING"}
    members = {m.name for m in cluster.known.generation.members}
    assert snapshot["state"] in STATES
    if snapshot["state"] == "SERVING":
        assert serving == set(workers)
        assert snapshot["experts_complete"]
    if snapshot["state"] == "DEGRADED":
        assert serving in (set(), members)
    if snapshot["state"] in ("STARTING", "RECOVERING"):
        assert not serving
    if snapshot["state"] == "STOPPED":
        assert set(workers.values()) == {"LOST"}
    if serving and snapshot["state"] != "DRAINING":
        assert snapshot["experts_complete"]
        devices = {m.device for m in cluster.known.generation.experts}
        for bank in cluster.known.placement.banks:
            assert set(bank.decode_device) <= devices
    now = (snapshot["version"], snapshot["generation"], snapshot["placement_epoch"])
    assert all(new >= old for new, old in zip(now, before, strict=True))
    return now


@pytest.mark.parametrize("seed", quick_rows(range(30), range(60)))
def test_random_events_keep_the_state_legal_and_consistent(seed: int) -> None:
    draw = random.Random(seed)
    cluster = FakeCluster(draw.randint(1, 3), draw.randint(1, 4), num_redundant=draw.randint(0, 3))
    if draw.random() < 0.8:
        cluster.serve()
    before = (0, 0, 0)
    for _ in range(250):
        try:
            _random_event(cluster, draw)
        except ProtocolError:
            pass  # the server closes that connection
        except IllegalTransitionError as err:
            pytest.fail(f"seed {seed}: {err}")
        before = _check_consistent(cluster, before)


HOSTS = {"attention-0": "head", "expert-0": "h-1", "expert-1": "h-2", "expert-2": "h-3"}


def silent_cluster(seconds: float, num_redundant: int = 4) -> FakeCluster:
    """A cluster in which only the worker at the controller's host is heard."""
    cluster = FakeCluster(1, 3, num_redundant=num_redundant, hosts=HOSTS)
    cluster.serve()
    cluster.beat_all()
    for _ in range(round(2 * seconds)):
        cluster.tick(0.5)
        cluster.beat("attention-0")
    return cluster


def test_a_pause_of_the_controllers_host_replaces_no_worker() -> None:
    cluster = silent_cluster(3.5)
    loss = PeerLost(worker="expert-1", generation=1, reason="silent")
    cluster.send("attention-0", loss)
    cluster.tick(0.4)
    assert cluster.link.ended == []
    cluster.beat_all("expert-2")  # the last one is back a moment later
    cluster.send("expert-0", PeerLost(worker="attention-0", generation=1, reason="silent"))
    cluster.tick(0.1)
    assert cluster.known.generation.number == 2
    cluster.beat_all()
    cluster.tick(0.5)
    cluster.join_all(highest_step=7)
    assert (cluster.state, cluster.known.term) == ("SERVING", 1)
    assert cluster.link.ended == []
    assert cluster.started() == []
    last = cluster.controller.snapshot()["history"][-1]
    assert last["cause"].startswith("most other hosts were silent for ")


def test_hosts_that_stay_silent_are_lost() -> None:
    cluster = silent_cluster(29.0)
    assert cluster.link.ended == []
    cluster.tick(0.5)
    cluster.beat("attention-0")
    cluster.tick(1.5)
    assert cluster.link.ended == ["expert-0", "expert-1", "expert-2"]


def test_who_waits_for_silent_hosts_is_not_late() -> None:
    """Neither a member that has yet to open its edges nor a new worker that keeps it from them."""
    cluster = FakeCluster(1, 3, num_redundant=4, hosts=HOSTS)
    cluster.serve()
    cluster.disconnect("expert-2")
    cluster.beat_all()
    for _ in range(58):
        cluster.tick(0.5)
        cluster.beat("attention-0")
    assert cluster.link.ended == ["expert-2"]


@pytest.mark.parametrize("was_reported_before", [False, True])
def test_who_wakes_up_believes_no_report_before_it_has_heard_the_other_hosts(
    was_reported_before: bool,
) -> None:
    """The path that was lost may be that of its own host."""
    cluster = FakeCluster(1, 3, num_redundant=4, hosts=HOSTS)
    cluster.serve()
    cluster.beat_all()
    cluster.tick(0.1)
    report = PeerLost(worker="expert-1", generation=1, reason="silent")
    if was_reported_before:
        cluster.send("attention-0", report)
    cluster.now += 2.0
    cluster.controller.tick(cluster.now)
    assert cluster.link.ended == [], "what has come in the pause is not read yet"
    cluster.beat_all()
    cluster.send("attention-0", report)
    for _ in range(12):
        cluster.tick(0.1)
        cluster.beat("attention-0")
    assert cluster.link.ended == []


def test_reports_that_were_made_in_a_pause_of_the_controller_are_void() -> None:
    """The path may be good again, and who was silent then is not known: all try it again."""
    cluster = FakeCluster(1, 3, num_redundant=4)
    cluster.serve()
    cluster.beat_all()
    cluster.tick(0.1)
    cluster.now += 5.0
    cluster.controller.tick(cluster.now)
    cluster.beat_all()
    cluster.send("attention-0", PeerLost(worker="expert-1", generation=1, reason="silent"))
    cluster.tick(0.1)
    assert (cluster.link.ended, cluster.known.generation.number) == ([], 2)
    cluster.join_all()
    assert cluster.state == "SERVING"
    cluster.send("attention-0", PeerLost(worker="expert-1", generation=2, reason="silent"))
    for _ in range(3):
        cluster.beat_all()
        cluster.tick(0.1)
    assert cluster.link.ended == ["expert-1"]


def test_a_controller_that_is_often_late_believes_reports_all_the_same() -> None:
    cluster = FakeCluster(1, 3, num_redundant=4, hosts=HOSTS)
    cluster.serve()
    cluster.send("attention-0", PeerLost(worker="expert-1", generation=1, reason="silent"))
    for _ in range(4):
        cluster.beat_all()
        cluster.now += 0.4
        cluster.controller.tick(cluster.now)
    assert cluster.link.ended == ["expert-1"]


def test_a_silent_host_that_ray_has_lost_is_not_waited_for() -> None:
    cluster = silent_cluster(2.0)
    here = frozenset({"id"})
    cluster.known.nodes_alive({"head": here, "h-1": here, "h-3": here}, cluster.now)
    cluster.tick(0.1)
    assert cluster.link.ended == ["expert-1"]


def test_ray_ends_the_hold_of_all_silent_hosts_at_once() -> None:
    """They get no credit as if they were back, and no generation is formed with them."""
    cluster = silent_cluster(4.0)
    cluster.known.nodes_alive({"head": frozenset({"id"})}, cluster.now)
    cluster.tick(0.1)
    assert cluster.link.ended == ["expert-0", "expert-1", "expert-2"]
    causes = [entry["cause"] for entry in cluster.controller.snapshot()["history"]]
    assert not any(cause.startswith("most other hosts were silent") for cause in causes)


def test_a_short_silence_of_most_hosts_changes_nothing() -> None:
    cluster = silent_cluster(1.5)
    cluster.beat_all()
    cluster.tick(0.1)
    assert (cluster.known.generation.number, cluster.link.ended) == (1, [])


def test_of_two_ends_of_a_path_the_one_that_is_not_heard_is_lost() -> None:
    """It has died where the controller cannot see it; nobody else has its experts."""
    cluster = FakeCluster(2, 3)
    cluster.serve()
    cluster.tick(0.1)
    report = PeerLost(worker="expert-0", generation=1, reason="closed by the peer")
    cluster.send("attention-1", report)
    cluster.beat_all("expert-0")
    cluster.tick(0.3)
    assert cluster.link.ended == ["expert-0"]


@pytest.mark.parametrize("is_new_one_heard", [True, False])
def test_a_new_worker_does_not_tell_whether_the_others_are_silent(is_new_one_heard: bool) -> None:
    """Without any old member, a new generation could run beside the old one, which still serves."""
    names = ("attention-0", "attention-1", "expert-0", "expert-1")
    cluster = FakeCluster(2, 2, num_redundant=9, hosts={n: f"host-{n[-1]}" for n in names})
    cluster.serve()
    cluster.disconnect("attention-1")
    cluster.disconnect("expert-1")
    cluster.join_all()
    cluster.tick(0.1)
    for name in ("attention-1.2", "expert-1.2"):
        cluster.bring_up(name)
    cluster.beat_all()
    for _ in range(6):
        cluster.tick(0.5)
        if is_new_one_heard:
            for name in ("attention-1.2", "expert-1.2"):
                cluster.beat(name)
    assert cluster.link.ended == ["attention-1", "expert-1"]


@pytest.mark.parametrize(("is_waiting", "is_late"), [(True, True), (True, False), (False, True)])
def test_who_waits_in_a_step_itself_is_not_lost_for_keeping_others_waiting(
    is_waiting: bool, is_late: bool
) -> None:
    cluster = FakeCluster(2, 3)
    cluster.serve()
    for _ in range(6):
        cluster.tick(0.5)
        cluster.beat_all("attention-1")
        cluster.beat("attention-1", idle=not is_waiting, waiting=is_waiting)
    report = PeerLost(worker="attention-1", generation=1, reason="no step", is_late=is_late)
    cluster.send("attention-0", report)
    cluster.tick(0.3)
    assert cluster.known.generation.number == 2
    assert cluster.link.ended == ([] if is_waiting and is_late else ["attention-1"])


def test_the_counts_of_a_lost_worker_are_kept_as_a_sum() -> None:
    cluster = FakeCluster(2, 2)
    cluster.serve()
    cluster.send("attention-1", StatusReply(token=0, expert_load=load_of(5, [5] * 8)))
    cluster.disconnect("attention-1")
    newer = make_report(1, [1] * 8, epoch=2)
    cluster.send("attention-0", StatusReply(token=0, expert_load=newer))
    cluster.tick(0.1)
    assert list(cluster.known.load._reports) == ["attention-0"]
    assert cluster.known.load.totals().rows == 6
