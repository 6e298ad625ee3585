"""The controller actor's whole path without Ray: real sockets, workers as threads."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from ray.exceptions import RayError

from benchmarks.harness.members import member_of
from benchmarks.harness.worker_group import LocalWorkerGroup
from cluster.actors import controller_actor, controller_runner
from cluster.actors.control_server import ControlServer
from cluster.actors.controller_actor import ControllerActor
from cluster.actors.tasks import Background
from cluster.config.cluster import ClusterConfig
from cluster.config.model import ModelSection
from cluster.config.transport import TransportSection
from cluster.config.workers import Mode, WorkersSection
from cluster.controller import gateway_polls
from cluster.controller.controller_memory import ControllerMemory
from cluster.controller.failover import CollectedState, ReportCollector
from cluster.core.errors import (
    ConfigError,
    ConflictError,
    NotReadyError,
    StartError,
    SupersededError,
    UnknownNameError,
)
from cluster.core.frames import (
    ControlFrame,
    ControllerSnapshot,
    GenerationReady,
    Heartbeat,
    LowDisk,
    NewGeneration,
    Register,
    RunGeneration,
    Shutdown,
    SnapshotKept,
    StatusReply,
    Superseded,
    WorkerReady,
)
from cluster.core.load_profile import BankLoad, LoadProfile
from cluster.core.topology import Generation, Member
from cluster.sizing.start_plan import ExistingWorker, StartPlan, plan_start
from cluster.tracing.disks import DiskMonitor
from tests.cluster.controller.fakes_cluster import FakeCluster, slots_of
from tests.cluster.controller.load_reports import load_of
from workers.process.control.control_client import ControlClient

BANKS = [{"bank": "mlp", "layer": 0, "num_experts": 8}]
LIMIT_S = 60.0


class ThreadWorker:
    """A worker as far as the controller can see: its control client and prompt answers."""

    def __init__(self, member: Mapping[str, Any], address: str, token: str) -> None:
        self.name = str(member["name"])
        self.runs: queue.Queue[int] = queue.Queue()
        """First steps of the generations that were run."""
        self._generation = self._epoch = 0
        self._is_running = False
        self.kept: list[ControllerSnapshot] = []
        """Snapshots that it was given, of which it tells the controller once it may."""
        self.may_keep = threading.Event()
        """That of its group."""
        self.may_keep.set()
        self.client = ControlClient(
            address,
            token,
            self.name,
            self._on_frame,
            heartbeat=self._heartbeat,
            status=self._status,
            heartbeat_s=0.1,
        )

    def start(self) -> None:
        """Call the controller, load at once."""
        self.client.start()
        self.client.send(Register(member=member_of(self.name, pid=1)))
        self.client.send(WorkerReady())

    def _heartbeat(self) -> Heartbeat:
        return Heartbeat(
            progress=0,
            idle=True,
            generation=self._generation,
            running=self._is_running,
            epoch=self._epoch,
        )

    def _status(self) -> StatusReply:
        stats = {"kv_blocks_free": 7.0, "kv_blocks_total": 8.0}
        return StatusReply(token=0, stats=stats, expert_load=load_of(4, [1] * 8))

    def _on_frame(self, frame: ControlFrame) -> None:
        if isinstance(frame, NewGeneration):
            self._generation = frame.generation.number
            self._epoch, self._is_running = frame.placement.epoch, False
            self.client.send(
                GenerationReady(
                    generation=self._generation,
                    highest_step=10,
                    highest_epoch=1,
                    slots=slots_of(frame, self.name),
                )
            )
        elif isinstance(frame, RunGeneration):
            self._is_running = True
            self.runs.put(frame.first_step)
        elif isinstance(frame, ControllerSnapshot):
            self._keep(frame)

    def _keep(self, snapshot: ControllerSnapshot) -> None:
        self.kept.append(snapshot)
        if self.may_keep.is_set():
            self.client.send(SnapshotKept(version=snapshot.version))

    def keep_all(self) -> None:
        """Acknowledge the snapshots that came before."""
        for snapshot in list(self.kept):
            self.client.send(SnapshotKept(version=snapshot.version))


class ThreadWorkerGroup(LocalWorkerGroup):
    """A worker group whose workers are threads of this process."""

    def __init__(
        self, fails: str = "", dies: str = "", room: bool = True, crashes: bool = False
    ) -> None:
        super().__init__()
        self.workers: dict[str, ThreadWorker] = {}
        self.ended: list[str] = []
        self.plan: StartPlan | None = None
        self.all_ended = 0
        self.may_keep = threading.Event()
        """While it is not set, no worker acknowledges a snapshot."""
        self.may_keep.set()
        self._fails, self._dies, self._room = fails, dies, room
        self._crashes = crashes

    def names(self) -> list[str]:
        return [name for name in self.workers if name not in self.ended]

    def extra(self, name: str) -> dict[str, Any]:
        """What a worker got besides the configuration."""
        assert self.plan is not None
        extra: dict[str, Any] = self.plan.arguments(member_of(name), "")[-1]
        return extra

    def reserve(self, workers: WorkersSection, limit_s: float) -> tuple[Member, ...]:
        if not self._room:
            raise StartError("worker group", "no room")
        return super().reserve(workers, limit_s)

    async def start(self, members: Sequence[Member], plan: StartPlan, address: str) -> None:
        self.plan = plan
        if self._crashes:
            raise RuntimeError("no such node")
        for member in members:
            worker = ThreadWorker({"name": member.name}, address, plan.config.cluster_token)
            self.workers[member.name] = worker
            worker.may_keep = self.may_keep
            if member.name == self._fails:
                raise StartError(member.name, "ValueError: no such tensor")
            if member.name != self._dies:
                await asyncio.to_thread(worker.start)

    async def watch(
        self, is_connected: Callable[[str], bool], on_died: Callable[[str, str], None]
    ) -> None:
        if self._dies:
            assert not is_connected(self._dies)
            on_died(self._dies, "its process died")

    async def end(self, names: Sequence[str]) -> None:
        self.ended.extend(names)
        for name in names:
            await asyncio.to_thread(self.workers[name].client.close)

    async def end_all(self) -> None:
        self.all_ended += 1
        await super().end_all()


def _config(
    num_experts: int = 2, num_redundant: int = 0, mode: Mode = "disaggregated"
) -> dict[str, Any]:
    return ClusterConfig(
        model=ModelSection(path="somewhere", served_model_name="demo"),
        workers=WorkersSection(
            mode=mode, num_expert_workers=num_experts, num_redundant_experts=num_redundant
        ),
        transport=TransportSection(detection_limit_s=LIMIT_S, heartbeat_s=0.1),
        cluster_token="secret",
    ).to_dict()


async def _until(actor: ControllerActor, *states: str) -> dict[str, Any]:
    """Follow the snapshots until one of these states."""
    async with asyncio.timeout(LIMIT_S):
        snapshot = await actor.snapshot()
        while snapshot["state"] not in states:
            snapshot = await actor.wait_snapshot(snapshot["version"], LIMIT_S)
        return snapshot


def test_a_cluster_starts_answers_and_stops() -> None:
    async def body() -> None:
        group = ThreadWorkerGroup()
        actor = ControllerActor(group, status_limit_s=LIMIT_S)
        assert (await actor.snapshot())["version"] == 0
        nothing: dict[str, Any] = {"schema": 1, "epoch": 0, "banks": []}
        assert await actor.placement() == nothing
        assert await actor.load() == nothing | {"model": None, "top_k": 0, "tokens": 0}
        bank = BankLoad(bank="mlp", layer=0, counts=(2, 2, 2, 2, 1, 1, 1, 1))
        profile = LoadProfile(model="demo", top_k=2, tokens=6, banks=(bank,))
        assert await actor.origin() == {"asked": None, "config": None}
        await actor.start(_config(), BANKS, profile.to_dict(), {"--port": "1"})
        snapshot = await _until(actor, "SERVING")
        assert actor.runner.server is not None
        assert actor.runner.server.address.startswith("127.0.0.1:")
        assert snapshot["generation"] == 1
        assert group.plan is not None
        assert group.plan.config.workers.cpus_per_worker == 0.6666
        assert group.plan.config.workers.device == "cpu"
        given = {"placement", "num_slots", "threads", "holders"}
        assert set(group.extra("expert-1")) == given
        report = await actor.placement()
        assert report["banks"][0]["load"] == [3] * 8
        assert report["banks"][0]["balancedness"] == {"predicted": 0.75, "achieved": 1.0}
        fresh = await actor.snapshot(fresh=True)
        assert fresh["workers"][0]["kv_blocks_free"] == 7
        await actor.start(_config(), BANKS, None, {"--port": "2"})  # a second start does nothing
        origin = await actor.origin()
        assert origin["asked"] == {"--port": "1"}
        assert origin["config"]["cluster_token"] == "secret"
        low = (LowDisk(folder="/logs", free_bytes=2 << 20),)
        told = await actor.wait_snapshot(-1, 0.0, "gateway-7", "10.0.0.9", low)
        said = "the disk of /logs on 10.0.0.9 is nearly full: 2 MiB are free"
        assert told["problems"] == [said]
        await actor.gateway_leaves("gateway-7")
        await actor.gateway_leaves("gateway-8")  # it has never asked
        assert (await actor.snapshot())["problems"] == []
        causes = [entry["cause"] for entry in (await actor.snapshot())["history"]]
        assert [cause for cause in causes if "gateway" in cause] == ["gateway-7 has left"]
        await actor.stop()
        assert (await actor.snapshot())["state"] == "STOPPED"
        assert sorted(group.ended) == ["attention-0", "expert-0", "expert-1"]

    asyncio.run(body())


def test_a_dead_worker_stalls_the_others_briefly() -> None:
    async def body() -> None:
        group = ThreadWorkerGroup()
        actor = ControllerActor(group)
        await actor.start(_config(3, 5), BANKS)
        await _until(actor, "SERVING")
        survivors = [group.workers[n] for n in ("attention-0", "expert-0", "expert-2")]
        await asyncio.gather(*(asyncio.to_thread(w.runs.get, timeout=LIMIT_S) for w in survivors))
        await asyncio.to_thread(group.workers["expert-1"].client.close)
        snapshot = await _until(actor, "DEGRADED")  # by its closed connection: silence takes longer
        assert snapshot["experts_complete"]
        assert snapshot["generation"] == 2
        assert "its control connection closed" in snapshot["history"][-1]["cause"]
        waits = [asyncio.to_thread(w.runs.get, timeout=LIMIT_S) for w in survivors]
        assert await asyncio.gather(*waits) == [11, 11, 11]
        await actor.stop()
        assert group.ended[0] == "expert-1"

    asyncio.run(body())


def test_gateways_that_come_and_go_are_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_polls, "SILENCE_LIMIT_S", 0.0)

    async def body() -> None:
        actor = ControllerActor(ThreadWorkerGroup())

        async def until_event(cause: str) -> None:
            async with asyncio.timeout(LIMIT_S):
                snapshot = await actor.snapshot()
                while snapshot["history"][-1]["cause"] != cause:
                    snapshot = await actor.wait_snapshot(snapshot["version"], LIMIT_S)

        await actor.start(_config(), BANKS)
        await _until(actor, "SERVING")
        await actor.wait_snapshot(-1, LIMIT_S, "gateway-7")
        await until_event("gateway-7 is gone: it no longer asks")
        monkeypatch.undo()
        await actor.wait_snapshot(-1, LIMIT_S, "gateway-7")
        await until_event("gateway-7 is back")
        await actor.gateway_leaves("gateway-7")
        await until_event("gateway-7 has left")
        await actor.stop()

    asyncio.run(body())


class HangingWorkerGroup(ThreadWorkerGroup):
    """New workers in places of lost ones hang in their constructors, or wait for room."""

    def __init__(self, has_process: bool) -> None:
        super().__init__()
        self.asked: asyncio.Queue[str] = asyncio.Queue()
        self._has_process = has_process

    async def start(self, members: Sequence[Member], plan: StartPlan, address: str) -> None:
        if self.workers:
            self.asked.put_nowait(members[0].name)
            await asyncio.Event().wait()
        await super().start(members, plan, address)

    async def watch_creation(self, names: Sequence[str], on_process: Callable[[str], None]) -> None:
        if self.workers and self._has_process:
            for name in names:
                on_process(name)


@pytest.mark.parametrize("has_process", [True, False], ids=["hangs", "waits for room"])
def test_a_constructor_that_hangs_is_no_worker_that_waits_for_room(has_process: bool) -> None:
    async def body() -> None:
        group = HangingWorkerGroup(has_process)
        actor = ControllerActor(group)
        await actor.start(_config(3, 5), BANKS)
        await _until(actor, "SERVING")
        await asyncio.to_thread(group.workers["expert-1"].client.close)
        async with asyncio.timeout(LIMIT_S):
            name = await group.asked.get()
        assert actor.runner.controller is not None
        assert actor.runner.controller.cluster.workers[name].has_process is has_process
        await actor.stop()

    asyncio.run(body())


def test_an_effect_that_fails_does_not_lose_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    send = ControlServer.send

    def fail(self: ControlServer, frame: ControlFrame, *workers: str) -> None:
        if isinstance(frame, Shutdown):
            raise ValueError("cannot be encoded")
        send(self, frame, *workers)

    async def body() -> None:
        group = ThreadWorkerGroup()
        actor = ControllerActor(group)
        await actor.start(_config(3, 5), BANKS)
        await _until(actor, "SERVING")
        with monkeypatch.context() as patch:
            patch.setattr(ControlServer, "send", fail)
            await asyncio.to_thread(group.workers["expert-1"].client.close)
            await _until(actor, "DEGRADED")  # a generation without it runs
            assert group.ended == ["expert-1"]
        await actor.stop()

    asyncio.run(body())


def test_workers_of_a_node_that_is_to_go_are_drained() -> None:
    async def body() -> None:
        group = ThreadWorkerGroup()
        actor = ControllerActor(group, status_limit_s=LIMIT_S)
        await actor.start(_config(num_redundant=4), BANKS)
        await _until(actor, "SERVING")
        group.on_leaving_nodes = ["expert-1"]
        async with asyncio.timeout(LIMIT_S):
            while not (found := await actor.operations()) or found[0]["state"] == "RUNNING":
                await asyncio.sleep(0.02)
        assert (found[0]["state"], found[0]["target"]) == ("SUCCEEDED", "expert-1")
        assert group.ended == ["expert-1"]
        with pytest.raises(UnknownNameError):
            await actor.operation("drain-9.9")
        await actor.stop()

    asyncio.run(body())


def test_colocated_workers_share_cpus_and_experts_and_the_mode_is_reported() -> None:
    async def body() -> None:
        group = ThreadWorkerGroup()
        actor = ControllerActor(group)
        config = _config(2, 1, "colocated")
        config["workers"]["mode_reason"] = "it is faster"
        await actor.start(config, BANKS)
        snapshot = await _until(actor, "SERVING")
        assert (snapshot["mode"], snapshot["mode_reason"]) == ("colocated", "it is faster")
        workers = snapshot["workers"]
        assert [(w["name"], w["role"]) for w in workers] == [
            ("colocated-0", "colocated"),
            ("colocated-1", "colocated"),
        ]
        assert group.plan is not None
        assert group.plan.config.workers.cpus_per_worker == 1.0
        slots = [group.extra(w["name"])["num_slots"] for w in workers]
        assert slots == [w["slots"] for w in workers] == [5, 5]
        await actor.stop()

    asyncio.run(body())


def test_workers_share_what_others_had_left_before_the_start() -> None:
    async def body() -> None:
        group = ThreadWorkerGroup()
        actor = ControllerActor(group)
        await actor.start(_config(mode="local"), BANKS, free_cpus=1.25)
        await _until(actor, "SERVING")
        assert group.plan is not None
        assert (group.plan.share.cpus, group.plan.share.threads) == (1.25, 1)
        await actor.stop()

    asyncio.run(body())


def test_local_mode_is_one_worker_with_all_experts() -> None:
    async def body() -> None:
        group = ThreadWorkerGroup()
        actor = ControllerActor(group)
        await actor.start(_config(mode="local"), BANKS)
        snapshot = await _until(actor, "SERVING")
        assert snapshot["experts_complete"]
        assert list(group.workers) == ["attention-0"]
        assert group.extra("attention-0")["num_slots"] == 8
        assert group.extra("attention-0")["threads"] == 2, "all cores of the fake node"
        load = await actor.load()
        assert load["workers"] == ["attention-0"]
        assert [bank["at_risk"] for bank in load["banks"]] == [
            len(b["counts"]) for b in load["banks"]
        ]
        await actor.stop()

    asyncio.run(body())


def test_any_error_of_the_creation_ends_the_start() -> None:
    async def body() -> None:
        actor = ControllerActor(ThreadWorkerGroup(crashes=True))
        await actor.start(_config(), BANKS)
        snapshot = await _until(actor, "STOPPED")
        assert snapshot["error"] == "RuntimeError: no such node"
        await actor.stop()

    asyncio.run(body())


@pytest.mark.parametrize(
    ("group", "error"),
    [
        (ThreadWorkerGroup(fails="expert-1"), "expert-1: ValueError: no such tensor"),
        (ThreadWorkerGroup(dies="expert-0"), "expert-0: its process died"),
    ],
    ids=["fails", "dies"],
)
def test_a_failing_worker_ends_the_start(group: ThreadWorkerGroup, error: str) -> None:
    async def body() -> None:
        actor = ControllerActor(group)
        await actor.start(_config(), BANKS)
        snapshot = await _until(actor, "STOPPED")
        assert snapshot["error"] == error
        assert {w["state"] for w in snapshot["workers"]} == {"LOST"}
        assert sorted(group.ended) == ["attention-0", "expert-0", "expert-1"]
        await actor.stop()

    asyncio.run(body())


def test_what_cannot_begin_is_refused_and_can_be_tried_again() -> None:
    async def body() -> None:
        group = ThreadWorkerGroup(room=False)
        actor = ControllerActor(group)
        with pytest.raises(ConfigError, match="num_expert_workers"):
            await actor.start(_config(9), BANKS)
        with pytest.raises(StartError, match="no room"):
            await actor.start(_config(), BANKS)
        assert group.all_ended == 1
        assert (await actor.snapshot())["state"] == "STARTING"
        await actor.stop()

    asyncio.run(body())


class BrokenRayGroup(ThreadWorkerGroup):
    """Ray's head dies while room is reserved."""

    def reserve(self, workers: WorkersSection, limit_s: float) -> tuple[Member, ...]:
        raise RayError("no answer of the head")


def test_a_start_that_ray_refuses_leaves_nothing_behind() -> None:
    async def body() -> None:
        group = BrokenRayGroup()
        actor = ControllerActor(group)
        with pytest.raises(RayError, match="no answer of the head"):
            await actor.start(_config(), BANKS)
        assert group.all_ended == 1
        assert actor.runner.server is not None
        with pytest.raises(OSError, match="Connect call failed"):
            await asyncio.open_connection(*actor.runner.server.address.split(":"))
        await actor.stop()

    asyncio.run(body())


class LateGroup(ThreadWorkerGroup):
    """What an earlier controller left cannot be found at once."""

    def __init__(self) -> None:
        super().__init__()
        self.may_answer = asyncio.Event()

    def was_restarted(self) -> bool:
        return True

    def call_back(self, method: str) -> None:
        assert method == "restore"

    async def find(self, limit_s: float) -> tuple[ExistingWorker, ...]:
        if not self.may_answer.is_set():
            raise RuntimeError("Ray does not answer")
        return ()


def test_a_restarted_controller_tries_again_and_says_so() -> None:
    async def body() -> None:
        group = LateGroup()
        actor = ControllerActor(group)
        snapshot = await actor.snapshot()
        assert snapshot["state"] == "RECOVERING"
        assert snapshot["error"].endswith("RuntimeError: Ray does not answer")
        assert snapshot["term"] == 0  # no worker of the cluster follows it
        with pytest.raises(StartError, match="Ray does not answer"):
            await actor.start(_config(), BANKS)
        with pytest.raises(ConflictError, match="Ray does not answer"):
            await actor.operation("drain-1.1")
        group.may_answer.set()
        async with asyncio.timeout(LIMIT_S):
            while (snapshot := await actor.wait_snapshot(0, 0.05))["state"] != "STOPPED":
                assert group.all_ended == 0
        assert snapshot["error"] == "the restarted controller found no live worker"
        await actor.stop()

    asyncio.run(body())


class OvertakenGroup(LateGroup):
    """A worker follows another controller, which has claimed a higher term."""

    async def find(self, limit_s: float) -> tuple[ExistingWorker, ...]:
        config = ClusterConfig.from_dict(_config())
        return (ExistingWorker(name="expert-0", config=config, num_slots=1),)

    async def redirect(self, name: str, control_address: str) -> None:
        self.newest_term += 1
        raise SupersededError("a controller of the older term 1")


def test_a_restarted_controller_that_was_overtaken_lets_go() -> None:
    async def body() -> None:
        group = OvertakenGroup()
        actor = ControllerActor(group)
        snapshot = await _until(actor, "STOPPED")
        assert snapshot["error"] == "term 2 is claimed"
        assert (group.newest_term, group.ended, group.has_ended_controller) == (2, [], True)
        await actor.stop()

    asyncio.run(body())


def test_a_controller_that_collects_reports_lets_go_when_a_worker_follows_another() -> None:
    async def body() -> None:
        group = OvertakenGroup()
        restarted = controller_runner.ControllerRunner(group, Background())
        restarted.on_frame("expert-0", Superseded(term=4))
        assert not group.has_ended_controller, "there is nothing to let go of"
        restarted.collector = ReportCollector(["expert-0"], 0.0, limit_s=1.0, confirm_s=0.1)
        restarted.on_frame("expert-0", Superseded(term=4))
        assert group.has_ended_controller
        assert restarted.failure == "expert-0 follows another controller, of term 4"

    asyncio.run(body())


class BrokenDisks(DiskMonitor):
    """No look succeeds, not even to begin."""

    def low(self, now: float) -> tuple[LowDisk, ...]:
        raise OSError("no look")


def test_time_passes_for_a_controller_that_cannot_look_at_its_disks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(controller_runner, "DiskMonitor", BrokenDisks)
    cluster = FakeCluster(1, 1)
    cluster.serve()

    async def body() -> None:
        running = controller_runner.ControllerRunner(LateGroup(), Background())
        running.controller = cluster.controller
        ticks = asyncio.create_task(running._tick_forever(cluster.controller))
        ticks_at = set[float]()
        async with asyncio.timeout(LIMIT_S):
            while len(ticks_at) < 3 and not ticks.done():
                await asyncio.sleep(0.01)
                ticks_at.add(cluster.controller.detection.last_tick)
        assert not ticks.done()
        ticks.cancel()

    asyncio.run(body())


class DyingGroup(LateGroup):
    """A worker is found, and has died when it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    async def find(self, limit_s: float) -> tuple[ExistingWorker, ...]:
        config = ClusterConfig.from_dict(_config())
        found = ExistingWorker(name="expert-0", config=config, num_slots=1)
        return () if self.num_calls else (found,)

    async def redirect(self, name: str, control_address: str) -> None:
        self.num_calls += 1
        raise ProcessLookupError("it has died")


def test_a_restarted_controller_does_not_wait_for_a_worker_that_has_died() -> None:
    async def body() -> None:
        group = DyingGroup()
        actor = ControllerActor(group)
        async with asyncio.timeout(LIMIT_S):
            while (await actor.wait_snapshot(0, 0.05))["state"] != "STOPPED":
                pass
        assert group.num_calls == 1
        await actor.stop()

    asyncio.run(body())


class NewController:
    """Another controller's socket events."""

    def on_frame(self, worker: str, frame: ControlFrame) -> None:
        return None

    def on_closed(self, worker: str, reason: str, is_invalid: bool) -> None:
        return None


def test_a_controller_whose_workers_follow_another_one_ends_nobody() -> None:
    async def body() -> None:
        group = ThreadWorkerGroup()
        actor = ControllerActor(group)
        await actor.start(_config(), BANKS)
        await _until(actor, "SERVING")
        newer = ControlServer("secret", NewController())
        address = await newer.start("127.0.0.1")
        for worker in group.workers.values():
            worker.client.redirect(address)
        snapshot = await _until(actor, "STOPPED")
        assert snapshot["error"].endswith("follows another controller, of term 1")
        assert group.has_ended_controller
        async with asyncio.timeout(LIMIT_S):
            while not all(map(newer.is_connected, group.workers)):
                await asyncio.sleep(0.02)
        await actor.stop()
        assert (group.ended, group.all_ended) == ([], 0)
        for worker in group.workers.values():
            await asyncio.to_thread(worker.client.close)
        await newer.close()

    asyncio.run(body())


class UnwillingGroup(ThreadWorkerGroup):
    """Cannot end workers at first, or finds that another controller leads them."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self.errors = list(errors)

    async def end(self, names: Sequence[str]) -> None:
        if self.errors:
            raise self.errors.pop()
        await super().end(names)


def test_a_drain_ends_once_the_worker_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_runner, "_END_AGAIN_S", 0.0)

    async def body() -> None:
        group = UnwillingGroup(TimeoutError(), RuntimeError("Ray does not answer"))
        actor = ControllerActor(group, status_limit_s=LIMIT_S)
        await actor.start(_config(num_redundant=4), BANKS)
        await _until(actor, "SERVING")
        await actor.begin("drain", {"worker": "expert-1", "limit_s": LIMIT_S})
        async with asyncio.timeout(LIMIT_S):
            while (await actor.operations())[0]["state"] == "RUNNING":
                await asyncio.sleep(0.02)
        assert (group.errors, group.ended) == ([], ["expert-1"])
        await actor.stop()

    asyncio.run(body())


def test_a_command_is_answered_once_a_worker_keeps_it() -> None:
    """A controller that dies after the answer leaves the operation to the next one."""

    async def body() -> None:
        group = ThreadWorkerGroup()
        actor = ControllerActor(group, status_limit_s=LIMIT_S)
        await actor.start(_config(num_redundant=4), BANKS)
        await _until(actor, "SERVING")
        group.may_keep.clear()
        command = {"attention": 2, "expert": 2, "limit_s": LIMIT_S, "request_id": "x"}
        answer = asyncio.create_task(actor.begin("scale", command))
        worker = group.workers["expert-0"]
        async with asyncio.timeout(LIMIT_S):
            while not any(s.memory["operations"] for s in worker.kept):
                await asyncio.sleep(0.01)
        assert not answer.done()
        worker.keep_all()
        begun = await answer
        cancelled = asyncio.create_task(actor.cancel_operation(begun["id"]))
        async with asyncio.timeout(LIMIT_S):
            while worker.kept[-1].memory["operations"][-1]["state"] != "CANCELLED":
                await asyncio.sleep(0.01)
        assert not cancelled.done()
        worker.keep_all()
        assert (await cancelled)["state"] == "CANCELLED"
        await actor.stop()

    asyncio.run(body())


def test_a_command_that_no_worker_keeps_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent again, it is the same operation."""
    monkeypatch.setattr(controller_actor, "_KEEP_LIMIT_S", 0.05)

    async def body() -> None:
        group = ThreadWorkerGroup()
        actor = ControllerActor(group, status_limit_s=LIMIT_S)
        await actor.start(_config(num_redundant=4), BANKS)
        await _until(actor, "SERVING")
        group.may_keep.clear()
        command = {"attention": 2, "expert": 2, "limit_s": LIMIT_S, "request_id": "x"}
        with pytest.raises(NotReadyError, match="no worker has acknowledged the command yet"):
            await actor.begin("scale", command)
        with pytest.raises(NotReadyError, match="no worker has acknowledged the command yet"):
            await actor.begin("scale", command)
        group.may_keep.set()
        group.workers["expert-0"].keep_all()
        monkeypatch.setattr(controller_actor, "_KEEP_LIMIT_S", LIMIT_S)
        begun = await actor.begin("scale", command)
        assert [begun["id"]] == [o["id"] for o in await actor.operations()]
        await actor.stop()

    asyncio.run(body())


def test_workers_that_nobody_knows_are_ended_in_spite_of_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The controller before had created one that has never called, and had not given back the room
    of a place that it had removed."""
    monkeypatch.setattr(controller_runner, "_END_AGAIN_S", 0.0)

    async def body() -> None:
        group = UnwillingGroup(TimeoutError())
        group.workers["expert-1.2"] = ThreadWorker({"name": "expert-1.2"}, "127.0.0.1:1", "")
        group.reserved = {"expert-7"}
        config = ClusterConfig.from_dict(_config())
        plan = plan_start(config, BANKS, group.resources())
        collected = CollectedState(
            generation=Generation(number=0, members=()),
            placement=plan.placement,
            frames_by_worker={},
            memory=ControllerMemory(),
        )
        restarted = controller_runner.ControllerRunner(group, Background())
        await restarted.open_server("secret")
        restarted.resume(plan, collected, 2)
        async with asyncio.timeout(LIMIT_S):
            while not (group.ended and group.released):
                await asyncio.sleep(0.02)
        assert (group.errors, group.ended) == ([], ["expert-1.2"])
        assert group.released == ["expert-7"]
        await restarted.stop()

    asyncio.run(body())


def test_a_controller_with_an_older_term_stops_when_it_would_end_a_worker() -> None:
    async def body() -> None:
        group = UnwillingGroup(SupersededError("term 2 is claimed, this controller has 1"))
        actor = ControllerActor(group)
        await actor.start(_config(3, 5), BANKS)
        await _until(actor, "SERVING")
        await asyncio.to_thread(group.workers["expert-1"].client.close)
        snapshot = await _until(actor, "STOPPED")
        assert snapshot["error"] == "term 2 is claimed, this controller has 1"
        assert group.has_ended_controller
        await actor.stop()
        assert group.ended == []
        for worker in group.workers.values():
            await asyncio.to_thread(worker.client.close)

    asyncio.run(body())


class StaleGroup(ThreadWorkerGroup):
    """Finds that another controller leads the workers when it would start one again."""

    async def start(self, members: Sequence[Member], *facts: Any) -> None:
        if self.workers:
            raise SupersededError("term 2 is claimed, this controller has 1")
        await super().start(members, *facts)


def test_a_controller_with_an_older_term_stops_when_it_would_start_a_worker() -> None:
    async def body() -> None:
        group = StaleGroup()
        actor = ControllerActor(group)
        await actor.start(_config(3, 5), BANKS)
        await _until(actor, "SERVING")
        await asyncio.to_thread(group.workers["expert-1"].client.close)
        snapshot = await _until(actor, "STOPPED")
        assert snapshot["error"] == "term 2 is claimed, this controller has 1"
        assert group.has_ended_controller
        await actor.stop()
        for worker in group.workers.values():
            await asyncio.to_thread(worker.client.close)

    asyncio.run(body())


def test_waiting_for_a_change_ends_in_time() -> None:
    async def body() -> None:
        actor = ControllerActor(ThreadWorkerGroup())
        began = time.monotonic()
        assert (await actor.wait_snapshot(0, 0.1))["version"] == 0
        assert 0.05 < time.monotonic() - began < LIMIT_S
        assert (await actor.wait_snapshot(5, LIMIT_S))["version"] == 0

    asyncio.run(body())
