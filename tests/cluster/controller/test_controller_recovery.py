"""Losses that others make good: experts are loaded, new workers come, and what if they do not."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from benchmarks.harness.members import member_of
from cluster.controller import workers
from cluster.controller.cluster import Cluster
from cluster.controller.controller import Controller
from cluster.controller.failover import CollectedState, ReportCollector
from cluster.controller.settings import ControllerSettings
from cluster.core.arithmetic import ArithmeticOffer
from cluster.core.codec import to_plain
from cluster.core.frames import (
    ControllerSnapshot,
    Heartbeat,
    LoadExperts,
    NewGeneration,
    PeerLost,
    Register,
    WorkerFailed,
    WorkerReady,
    WorkerReport,
)
from tests.cluster.controller.controller_world import World
from tests.cluster.controller.fakes_cluster import BUILD, CONFIG, AtOnce, FakeCluster, slots_of
from tests.harness.metric_values import metric

ENOENT = "model.safetensors: no such file"


def lose(cluster: FakeCluster, *names: str) -> None:
    cluster.controller.lost(dict.fromkeys(names, "killed"), cluster.now)


def wait(cluster: FakeCluster, seconds: float) -> None:
    """Time passes for a cluster whose workers live."""
    for _ in range(round(seconds * 2)):
        cluster.tick(0.5)
        for record in cluster.known.workers.alive():
            if record.state.value != "STARTING":
                cluster.beat(record.name)


def last(cluster: FakeCluster) -> dict[str, Any]:
    found: dict[str, Any] = cluster.controller.snapshot()["history"][-1]
    return found


# ---- experts are loaded by others -----------------------------------------------------------


def test_survivors_load_the_experts_of_a_lost_worker_while_the_generation_forms() -> None:
    cluster = FakeCluster(1, 3)
    cluster.serve()
    lose(cluster, "expert-1")
    assert cluster.state == "RECOVERING"
    orders = [cluster.link.last(n, LoadExperts) for n in ("expert-0", "expert-2")]
    experts = [tuple(e) for order in orders if order is not None for e in order.experts]
    assert sorted((bank, expert) for bank, _, expert in experts) == [
        (bank, expert) for bank in (0, 1) for expert in (3, 4, 5)
    ]
    assert cluster.link.last("attention-0", LoadExperts) is None
    kinds = [type(frame) for frame in cluster.link.sent["expert-0"]]
    assert NewGeneration not in kinds[kinds.index(LoadExperts) :]  # they judge by its maps
    assert [order.epoch for order in orders if order is not None] == [2, 2]
    order = cluster.link.last("attention-0", NewGeneration)
    assert order is not None
    assert order.placement.epoch == 2
    cluster.join_all(highest_step=6)
    assert cluster.state == "RECOVERING"  # all have answered, none has all experts
    assert cluster.answer_loads("expert-0") > 0
    assert cluster.state == "RECOVERING"
    cluster.now += 0.5
    assert cluster.answer_loads("expert-2") > 0
    assert cluster.state == "DEGRADED"
    assert cluster.running()["attention-0"].first_step == 7
    assert last(cluster)["effect"] == (
        "expert-0, expert-2 load 6 experts; continue with 1 attention and 2 expert workers, "
        "placement epoch 2; runs from step 7 after 0.500 s"
    )
    assert last(cluster)["took_s"] == 0.5
    snapshot, stall = cluster.controller.snapshot(), "recovery_stall_seconds"
    for worker in ({}, {"cause": "expert_worker"}):
        assert metric(snapshot, "recoveries_total", **worker) == 1
        assert metric(snapshot, f"{stall}_count", **worker) == 1
    assert metric(snapshot, f"{stall}_sum") == 0.5
    assert [metric(snapshot, f"{stall}_bucket", le=le) for le in ("0.2", "0.5")] == [0, 1]
    assert metric(snapshot, "migration_slots_moved_total", reason="recovery") == 6
    assert metric(snapshot, "migration_seconds_count", reason="recovery") == 2
    assert metric(snapshot, "migration_seconds_sum", reason="recovery") == pytest.approx(0.5)


def test_loads_may_be_done_before_the_last_member_has_answered() -> None:
    cluster = FakeCluster(1, 2)
    cluster.serve()
    lose(cluster, "expert-1")
    assert cluster.answer_loads("expert-0") == 8
    assert cluster.state == "RECOVERING"
    cluster.join_all()
    assert cluster.state == "DEGRADED"


def test_a_loss_while_experts_are_loaded_adds_to_the_loads() -> None:
    cluster = FakeCluster(1, 4)
    cluster.serve()
    lose(cluster, "expert-1")
    lose(cluster, "expert-2")
    found = [cluster.answer_loads(n) for n in ("expert-0", "expert-3")]
    assert sum(found) == 8
    cluster.join_all()
    assert cluster.state == "DEGRADED"
    devices = {m.device for m in cluster.known.generation.experts}
    for bank in cluster.known.placement.banks:
        assert set(bank.decode_device) <= devices


def test_an_order_that_newer_maps_have_overtaken_is_given_again() -> None:
    """The worker refuses it, as its slots may be in force by now, and can load all the same."""
    world = World(1, 4, 0)
    world.crash("expert-1")
    world.crash("expert-2")
    assert world.controller is not None
    orders = {n: m.num_orders for n, m in world.workers.items() if m.num_orders}
    assert sum(orders.values()) > len(orders), "a worker has orders of both losses"
    rest = ("attention-0", "expert-0", "expert-3")
    for _ in range(3):  # all take the maps before their loaders begin; load again; run
        world.take_all(*rest)
        for name in orders:
            world.load(name)
    assert world.runnable() == [world.controller.cluster.generation.number]
    snapshot = world.controller.snapshot()
    assert snapshot["problems"] == []
    assert [e["cause"] for e in snapshot["history"] if "cannot load" in e["cause"]] == []


def test_a_slow_loader_frees_no_slot_that_a_later_generation_runs() -> None:
    """It frees what a new worker has taken over, when that worker is lost already."""
    world = World(1, 3, 0)
    rest = ("attention-0", "expert-0", "expert-2")
    world.crash("expert-1")
    for _ in range(2):
        world.take_all(*rest)
        for name in rest:
            world.load(name)
    world.tick(0.2)
    world.come_up("expert-1.2")
    for _ in range(2):
        world.take_all(*rest, "expert-1.2")
    assert world.controller is not None
    assert world.controller.snapshot()["state"] == "SERVING"
    world.crash("expert-1.2")
    for _ in range(2):
        world.take_all(*rest)
        world.check()
        for name in rest:
            world.load(name)
            world.check()
    world.take_all(*rest)
    assert world.runnable() == [world.controller.cluster.generation.number]


def test_what_one_cannot_load_another_does() -> None:
    cluster = FakeCluster(1, 3)
    cluster.serve()
    lose(cluster, "expert-1")
    failed = cluster.answer_loads("expert-0", error="out of memory")
    assert failed > 0
    first = cluster.answer_loads("expert-2")
    assert first == 6
    cluster.join_all()
    assert cluster.state == "DEGRADED"
    assert cluster.known.generation.number == 3
    assert "expert-0 cannot load" in last(cluster)["cause"]
    for bank in cluster.known.placement.banks:
        assert bank.physical_to_logical[0] == (0, 1, 2)


def test_a_disk_that_is_gone_is_named_and_tried_again() -> None:
    cluster = FakeCluster(1, 2)
    cluster.serve()
    lose(cluster, "expert-1")
    cluster.answer_loads("expert-0", error=ENOENT)
    snapshot = cluster.controller.snapshot()
    assert snapshot["state"] == "RECOVERING"
    assert not snapshot["experts_complete"]
    assert snapshot["problems"] == [f"expert-0 cannot load experts: {ENOENT}"]
    assert ENOENT in last(cluster)["cause"]
    assert last(cluster)["effect"].startswith("8 experts have no copy left")
    wait(cluster, 5.5)
    assert cluster.answer_loads("expert-0") == 8
    cluster.join_all()
    assert cluster.state == "DEGRADED"
    assert cluster.controller.snapshot()["problems"] == []


def test_an_answer_to_an_unknown_order_changes_nothing() -> None:
    cluster = FakeCluster(1, 3)
    cluster.serve()
    lose(cluster, "expert-1")
    order = cluster.link.last("expert-2", LoadExperts)
    assert order is not None
    cluster.link.sent["expert-0"].insert(0, order)  # not its own
    cluster.join_all()
    cluster.answer_loads("expert-0")
    assert cluster.state == "RECOVERING"
    cluster.answer_loads("expert-2")
    assert cluster.state == "DEGRADED"


# ---- new workers ----------------------------------------------------------------------------


def test_a_lost_worker_is_replaced_under_a_new_name() -> None:
    cluster = FakeCluster(1, 3, num_redundant=3)
    cluster.serve()
    lose(cluster, "expert-1")
    cluster.tick(0.2)
    assert cluster.started() == []  # the survivors come first
    cluster.join_all(highest_step=9)
    assert cluster.state == "DEGRADED"
    cluster.tick(0.2)
    ((member, placement),) = cluster.link.started
    assert (member.name, member.role, member.rank, member.device) == ("expert-1.2", "expert", 1, 1)
    assert placement == cluster.placement
    cluster.bring_up("expert-1.2")
    assert cluster.state == "RECOVERING"
    cluster.join_all(highest_step=30)
    snapshot = cluster.controller.snapshot()
    assert snapshot["state"] == "SERVING"
    assert snapshot["generation"] == 3
    assert cluster.known.placement.banks == cluster.placement.banks
    assert last(cluster)["cause"] == "expert-1.2 is ready"
    states = {w["name"]: w["state"] for w in snapshot["workers"]}
    assert states["expert-1"] == "LOST"
    assert states["expert-1.2"] == "SERVING"


def test_the_history_has_the_time_of_a_loss_whose_generation_formed_again() -> None:
    """A member has run a later epoch than the controller knew; meanwhile a gateway leaves."""
    cluster = FakeCluster(2, 2)
    cluster.serve()
    lose(cluster, "attention-1")
    for member in cluster.known.generation.members:
        cluster.join(member.name, highest_epoch=6)
    assert cluster.known.generation.number == 3
    cluster.known.note("a gateway has left", "its requests have ended", cluster.now)
    cluster.tick(0.1)
    cluster.join_all()
    _, loss, gateway = cluster.known.history.to_list()
    assert loss["cause"] == "lost attention-1: killed"
    assert (loss["generation"], loss["took_s"]) == (3, pytest.approx(0.1))
    assert (gateway["effect"], gateway["took_s"]) == ("its requests have ended", None)


def test_who_reports_one_of_many_lost_peers_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replacements of all of them start while the others still notice their loss."""
    monkeypatch.setattr(workers, "_MAX_LOST", 1)
    cluster = FakeCluster(3, 2, can_grow=False)
    cluster.serve()
    gone = ("attention-0", "attention-1", "expert-0")
    cluster.controller.lost(dict.fromkeys(gone, "its host is silent"), cluster.now)
    cluster.tick(0.1)
    assert cluster.started() == [f"{name}.2" for name in gone]
    cluster.send("attention-2", PeerLost(worker="attention-0", generation=1, reason="reset"))
    cluster.known.workers.forget(cluster.now)
    later = cluster.now + 61.0
    cluster.known.workers.add(member_of("attention-3"), later)
    lost = [r.name for r in cluster.known.workers if r.is_lost]
    assert lost == ["expert-0"], "all but the newest are dropped later"


def test_lost_workers_are_dropped_after_a_while_once_they_have_a_successor() -> None:
    cluster = FakeCluster(1, 3, num_redundant=3)
    cluster.serve()
    lose(cluster, "expert-1")
    table = cluster.known.workers
    table.forget(0.0)
    table.forget(1e6)
    assert "expert-1" in table, "nothing has replaced it"
    cluster.join_all(highest_step=9)
    cluster.tick(0.2)
    table.forget(1e6)
    assert [r.name for r in table if r.member.holds_experts] == [
        "expert-0",
        "expert-2",
        "expert-1.2",
    ]


def test_a_worker_that_comes_during_a_recovery_joins_after_it() -> None:
    cluster = FakeCluster(2, 2, num_redundant=4)
    cluster.serve()
    lose(cluster, "attention-1")
    cluster.join_all()
    cluster.tick(0.2)
    lose(cluster, "expert-0")
    cluster.bring_up("attention-1.2")
    assert "attention-1.2" not in {m.name for m in cluster.known.generation.members}
    cluster.join_all()
    assert "attention-1.2" in {m.name for m in cluster.known.generation.members}
    cluster.join_all()
    assert cluster.state == "DEGRADED"
    cluster.tick(0.2)
    cluster.bring_up("expert-0.2")
    cluster.join_all()
    assert cluster.state == "SERVING"


def test_a_cluster_that_lost_all_its_expert_workers_comes_back() -> None:
    cluster = FakeCluster(1, 2)
    cluster.serve()
    lose(cluster, "expert-0", "expert-1")
    assert cluster.state == "RECOVERING"
    cluster.tick(0.2)
    assert cluster.started() == ["expert-0.2", "expert-1.2"]
    cluster.bring_up("expert-1.2")
    assert cluster.answer_loads("expert-1.2") == 8
    cluster.join_all()
    assert cluster.state == "DEGRADED"
    cluster.bring_up("expert-0.2")
    cluster.join_all()
    assert cluster.state == "SERVING"
    assert cluster.known.placement.banks == cluster.placement.banks


def test_the_only_attention_worker_comes_back() -> None:
    cluster = FakeCluster(1, 2)
    cluster.serve()
    lose(cluster, "attention-0")
    cluster.tick(0.2)
    cluster.bring_up("attention-0.2")
    cluster.join_all()
    assert cluster.state == "SERVING"
    assert cluster.known.generation.leader.name == "attention-0.2"


@pytest.mark.parametrize(
    ("item", "word"),
    [
        ("checkpoint_id", "checkpoint"),
        ("kv_cache_dtype", "KV cache type"),
        ("config_hash", "configuration"),
    ],
)
def test_a_replacement_that_does_not_fit_never_meets_the_others(item: str, word: str) -> None:
    cluster = FakeCluster(1, 3, num_redundant=4)
    cluster.serve()
    lose(cluster, "expert-1")
    for name in ("expert-0", "expert-2"):
        cluster.answer_loads(name)
    cluster.join_all()
    number = cluster.known.generation.number
    cluster.tick(0.2)
    cluster.register("expert-1.2", build=replace(BUILD, **{item: "other"}))
    record = cluster.known.workers["expert-1.2"]
    was = getattr(BUILD, item)
    assert record.is_lost
    assert record.reason == f"{word} of expert-1.2 is other, attention-0 has {was}"
    assert cluster.link.ended == ["expert-1", "expert-1.2"]
    assert cluster.known.generation.number == number


def replace_expert(offer: ArithmeticOffer) -> FakeCluster:
    """A cluster of arithmetic dot lost ``expert-1``, and another worker calls in its place."""
    cluster = FakeCluster(1, 3, num_redundant=4)
    cluster.serve()
    assert cluster.known.generation.agreement.kernels == "dot"
    lose(cluster, "expert-1")
    for name in ("expert-0", "expert-2"):
        cluster.answer_loads(name)
    cluster.join_all()
    assert cluster.known.generation.agreement.kernels == "dot"
    cluster.tick(0.2)
    cluster.register("expert-1.2", offer=offer)
    return cluster


def test_where_exactness_is_demanded_another_arithmetic_is_refused() -> None:
    cluster = replace_expert(ArithmeticOffer(kernels=("fma",), is_strict=True))
    record = cluster.known.workers["expert-1.2"]
    assert record.is_lost
    assert record.reason == "expert-1.2 computes with fma, the others with dot"
    assert cluster.known.generation.agreement.is_exact


def test_a_member_of_another_arithmetic_ends_exactness() -> None:
    cluster = replace_expert(ArithmeticOffer(kernels=("fma",)))
    assert not cluster.known.workers["expert-1.2"].is_lost
    cluster.send("expert-1.2", WorkerReady())
    cluster.answer_loads("expert-1.2")
    cluster.join_all()
    assert "expert-1.2" in {m.name for m in cluster.known.generation.members}
    assert cluster.known.generation.agreement.reason == (
        "expert-1.2 computes with fma, the others with dot"
    )


def test_a_start_with_two_checkpoints_fails_by_name() -> None:
    cluster = FakeCluster(1, 2)
    cluster.register("attention-0")
    cluster.register("expert-0")
    cluster.register("expert-1", build=replace(BUILD, checkpoint_id="other"))
    words = "expert-1: checkpoint of expert-1 is other, attention-0 has demo"
    assert cluster.known.error == words


def test_a_worker_that_dies_three_times_while_starting_is_left_out() -> None:
    cluster = FakeCluster(1, 3, num_redundant=3)
    cluster.serve()
    lose(cluster, "expert-1")
    cluster.join_all()
    for number in (2, 3, 4):
        for _ in range(100):
            if f"expert-1.{number}" in cluster.started():
                break
            wait(cluster, 0.5)
        cluster.register(f"expert-1.{number}")
        cluster.send(f"expert-1.{number}", WorkerFailed(reason=ENOENT))
        assert cluster.state == "DEGRADED"  # a death while starting disturbs no other worker
        assert cluster.known.generation.number == 2
    wait(cluster, 60.0)
    assert cluster.started() == ["expert-1.2", "expert-1.3", "expert-1.4"]
    problem = f"expert-1 is left out: died 3 times while starting, last: {ENOENT}"
    assert cluster.controller.snapshot()["problems"] == [problem]
    assert last(cluster)["effect"] == "expert-1 is left out"
    lose(cluster, "expert-2")
    cluster.answer_loads("expert-0")
    cluster.join_all()
    wait(cluster, 0.5)
    lose(cluster, "expert-2.2")
    assert last(cluster)["effect"] == "start another one"  # the other place is not its own


def test_with_nothing_to_hope_for_the_state_is_degraded() -> None:
    """Then the gateway refuses what it let wait before."""
    cluster = FakeCluster(1, 2, can_grow=False)
    cluster.serve()
    lose(cluster, "expert-1")
    for number in (2, 3, 4):
        assert cluster.state == "RECOVERING"
        for _ in range(100):
            if f"expert-1.{number}" in cluster.started():
                break
            wait(cluster, 0.5)
        lose(cluster, f"expert-1.{number}")
    wait(cluster, 0.5)
    snapshot = cluster.controller.snapshot()
    assert snapshot["state"] == "DEGRADED"
    assert not snapshot["experts_complete"]


def test_a_ready_worker_with_nobody_left_to_wait_for_leaves_the_state_degraded() -> None:
    cluster = FakeCluster(1, 1)
    cluster.serve()
    lose(cluster, "attention-0", "expert-0")
    cluster.tick(0.2)
    cluster.bring_up("expert-0.2")
    for number in (2, 3, 4):
        for _ in range(100):
            if f"attention-0.{number}" in cluster.started():
                break
            wait(cluster, 0.5)
        assert cluster.state == "RECOVERING"
        lose(cluster, f"attention-0.{number}")
    wait(cluster, 0.5)
    assert cluster.state == "DEGRADED"


def test_a_cluster_that_cannot_run_soon_tries_again_what_is_left_out() -> None:
    cluster = FakeCluster(1, 1)
    cluster.serve()
    lose(cluster, "attention-0")
    for number in (2, 3, 4):
        for _ in range(100):
            if f"attention-0.{number}" in cluster.started():
                break
            wait(cluster, 0.5)
        lose(cluster, f"attention-0.{number}")
    wait(cluster, 31.0)
    assert cluster.state == "RECOVERING"
    cluster.bring_up("attention-0.5")
    cluster.join_all()
    assert cluster.state == "SERVING"


def test_a_worker_that_does_not_get_ready_is_lost() -> None:
    cluster = FakeCluster(1, 3, num_redundant=3, settings=ControllerSettings(start_limit_s=20.0))
    cluster.serve()
    lose(cluster, "expert-1")
    cluster.join_all()
    wait(cluster, 30.0)
    assert cluster.controller.snapshot()["problems"] == ["expert-1.2 waits for room"]
    cluster.register("expert-1.2")
    wait(cluster, 19.0)
    assert cluster.started() == ["expert-1.2"]
    wait(cluster, 10.0)
    assert "not ready within 20 s" in cluster.controller.snapshot()["history"][-1]["cause"]
    assert cluster.started() == ["expert-1.2", "expert-1.3"]


def test_a_worker_whose_process_runs_and_never_calls_is_lost() -> None:
    cluster = FakeCluster(1, 3, num_redundant=3, settings=ControllerSettings(start_limit_s=20.0))
    cluster.serve()
    lose(cluster, "expert-1")
    cluster.join_all()
    wait(cluster, 30.0)
    cluster.controller.created("expert-1.2", cluster.now)
    assert cluster.controller.snapshot()["problems"] == []
    wait(cluster, 10.0)
    cluster.controller.created("expert-1.2", cluster.now)  # its constructor has returned
    wait(cluster, 9.0)
    assert cluster.started() == ["expert-1.2"]
    wait(cluster, 10.0)
    assert "not ready within 20 s" in cluster.controller.snapshot()["history"][-1]["cause"]
    assert cluster.started() == ["expert-1.2", "expert-1.3"]


def test_a_starting_worker_may_be_silent_for_longer_than_a_serving_one() -> None:
    cluster = FakeCluster(1, 3, num_redundant=3)
    cluster.serve()
    lose(cluster, "expert-1")
    cluster.join_all()
    cluster.tick(0.2)
    cluster.register("expert-1.2")
    for _ in range(20):
        cluster.tick(0.5)
        cluster.beat_all("expert-1.2")
    assert {w["state"] for w in cluster.controller.snapshot()["workers"]} == {
        "SERVING",
        "LOADING",
        "LOST",
    }
    assert cluster.state == "DEGRADED"


@pytest.mark.parametrize("lost", ["expert-0", "attention-0"])
def test_no_worker_is_started_while_the_cluster_ends(lost: str) -> None:
    cluster = FakeCluster(1, 2, num_redundant=4)
    cluster.serve()
    cluster.controller.stop(cluster.now)
    lose(cluster, lost)
    cluster.tick(5.0)
    assert cluster.started() == []


# ---- a restarted controller -----------------------------------------------------------------


def test_a_restarted_controller_knows_what_the_cluster_shall_be() -> None:
    """One place is empty, and what its experts' only copies are on now is no desired placement."""
    old = FakeCluster(1, 3)
    old.serve()
    lose(old, "expert-1")
    for name in ("expert-0", "expert-2"):
        old.answer_loads(name)
    old.join_all(highest_step=9)
    assert old.state == "DEGRADED"
    new = FakeCluster(1, 3, settings=ControllerSettings())
    snapshot = old.link.last("attention-0", ControllerSnapshot)
    assert snapshot is not None
    collected = restore(old, snapshot.memory)
    new.controller = Controller(
        Cluster(
            collected.members,
            collected.placement,
            CONFIG,
            now=new.now,
            term=2,
        ),
        ControllerSettings(),
        AtOnce(),
    )
    new.link.cluster = new.known
    new.controller.restore(collected, new.now)
    assert new.state == "DEGRADED"
    assert new.known.desired.banks == old.placement.banks
    new.tick(0.2)
    ((member, placement),) = new.link.started
    assert member.name == "expert-1.2"
    assert placement.banks == old.placement.banks
    lose(new, "expert-2")
    loaded = new.answer_loads("expert-0")
    held = old.known.placement.banks[0].physical_to_logical[2]
    assert loaded == 2 * len([e for e in held if e >= 0])  # and nothing that it has already


def test_a_controller_that_dies_before_a_generation_runs_leaves_the_desired_placement() -> None:
    """The generation has maps of its own, which the next controller finds with the workers."""
    cluster = FakeCluster(1, 3)
    cluster.serve()
    lose(cluster, "expert-1")
    snapshot = cluster.link.last("attention-0", ControllerSnapshot)
    assert snapshot is not None
    assert cluster.known.placement.banks != cluster.placement.banks
    assert snapshot.memory["desired"], "the cluster is to be whole again"
    assert snapshot.memory["desired"]["banks"] == to_plain(cluster.placement)["banks"]


def restore(old: FakeCluster, memory: dict[str, Any]) -> CollectedState:
    """What the workers of a cluster that serves report to the next controller."""
    collector = ReportCollector([m.name for m in old.members], 0.0, limit_s=1.0, confirm_s=0.1)
    generation = old.known.generation
    for member in generation.members:
        report = WorkerReport(
            generation=generation,
            placement=old.known.placement,
            running=True,
            highest_step=10,
            highest_epoch=old.known.placement.epoch,
            memory=memory,
        )
        report = replace(report, slots=slots_of(report, member.name))
        for frame in (Register(member=member), WorkerReady(), report):
            collector.frame(member.name, frame, 0.0)
    found = collector.result()
    assert found is not None
    return found


def test_workers_that_come_while_a_generation_fails_join_the_next_one() -> None:
    cluster = FakeCluster(1, 3)
    cluster.serve()
    lose(cluster, "expert-0", "expert-1", "expert-2")
    cluster.tick(0.2)
    cluster.bring_up("expert-0.2")  # loads what the others had
    for name in ("expert-1.2", "expert-2.2"):
        cluster.bring_up(name)  # too late for the generation that is being formed
    assert cluster.answer_loads("expert-0.2", error=ENOENT)
    cluster.tick(0.1)
    assert {m.name for m in cluster.known.generation.experts} == {
        "expert-0.2",
        "expert-1.2",
        "expert-2.2",
    }
    cluster.join_all()
    assert cluster.state == "SERVING"


def test_experts_that_an_earlier_controller_ordered_are_in_their_slots_before_steps_run() -> None:
    """It dies after its orders; its successor's generation names slots that are still empty."""
    world = World(1, 3, 0)
    world.crash("expert-1")
    assert any(model.num_orders for model in world.workers.values())
    world.crash_controller(num_unsent=0)
    for model in world.workers.values():
        model.loads.clear()  # the loader gives the order up, or is slow
    world.restart_controller()
    for name in ("attention-0", "expert-0", "expert-2"):
        world.greet(name)
    world.tick(0.1)
    for name in ("attention-0", "expert-0", "expert-2"):
        world.take(name)
        world.take(name)
    assert world.controller is not None
    assert world.controller.cluster.is_forming
    assert world.controller.snapshot()["history"][-1]["effect"] == "load them"
    world.calm_down()
    world.check_calm()


# ---- what the workers run is not what the controller knows -----------------------------------


def beat_of(cluster: FakeCluster, **differs: Any) -> Heartbeat:
    known = cluster.known
    facts = {"generation": known.generation.number, "epoch": known.placement.epoch}
    return Heartbeat(**({"progress": 0, "idle": True, "running": True} | facts | differs))


@pytest.mark.parametrize(
    ("differs", "cause"),
    [
        ({"running": False}, "expert-0 does not run generation 1"),
        ({"generation": 0}, "expert-0 does not run generation 1"),
        ({"epoch": 2}, "expert-0 runs placement epoch 2, not 1"),
    ],
)
def test_a_member_that_runs_something_else_makes_the_next_generation(
    differs: dict[str, Any], cause: str
) -> None:
    """The frame that told why was lost with an earlier controller, for example."""
    cluster = FakeCluster()
    cluster.serve()
    for _ in range(3):
        cluster.send("expert-0", beat_of(cluster, **differs))
        assert cluster.known.generation.number == 1
        cluster.tick(0.5)
    cluster.send("expert-0", beat_of(cluster, **differs))
    assert cluster.known.generation.number == 2
    assert last(cluster)["cause"] == cause
    cluster.join_all()
    assert cluster.state == "SERVING"


def test_a_short_difference_means_nothing() -> None:
    """Heartbeats and orders cross each other on the way."""
    cluster = FakeCluster()
    cluster.serve()
    for _ in range(4):
        cluster.send("expert-0", beat_of(cluster, running=False))
        cluster.tick(0.5)
        cluster.send("expert-0", beat_of(cluster))
        cluster.tick(0.5)
    assert cluster.known.generation.number == 1


def test_the_versions_of_a_later_controller_are_higher() -> None:
    """Gateways drop older versions; a controller that ran for months has had many."""
    first = FakeCluster(1, 2)
    first.known.version += 100_000_000
    second = Cluster(first.members, first.placement, CONFIG, now=0.0, term=2)
    assert second.version > first.known.version
