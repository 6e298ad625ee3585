"""A controller with workers that exist only as records: what is sent to them is kept."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future
from typing import ParamSpec, TypeVar

from msgspec.structs import replace

from benchmarks.harness.members import member_of, members_of
from cluster.config.cluster import ClusterConfig
from cluster.config.model import ModelSection
from cluster.config.workers import WorkersSection
from cluster.controller.cluster import Cluster
from cluster.controller.controller import Controller
from cluster.controller.effects import (
    EndAllWorkers,
    EndWorkers,
    RecordTrace,
    SendFrame,
    StartWorker,
)
from cluster.controller.settings import ControllerSettings
from cluster.core.arithmetic import ArithmeticOffer
from cluster.core.frames import (
    ControlFrame,
    ExpertsLoaded,
    GenerationReady,
    Heartbeat,
    LoadExperts,
    NewGeneration,
    Register,
    RunGeneration,
    SlotContents,
    WorkerReady,
    WorkerReport,
)
from cluster.core.holders import ExpertHolder
from cluster.core.placement import BankShape, ExpertPlacement, contiguous
from cluster.core.release import Build
from cluster.core.topology import Member, Role

FrameT = TypeVar("FrameT", bound=ControlFrame)
P = ParamSpec("P")
T = TypeVar("T")

BUILD = Build(checkpoint_id="demo", config_hash="settings")
OFFER = ArithmeticOffer(kernels=("dot", "fma"))
CONFIG = ClusterConfig(model=ModelSection(path="somewhere", served_model_name="demo"))
BANKS = (
    BankShape(bank="mlp", layer=0, num_experts=8),
    BankShape(bank="mlp", layer=1, num_experts=8),
)


def make_members(num_attention: int, num_experts: int) -> tuple[Member, ...]:
    """The members of two pools."""
    return members_of({"attention": num_attention, "expert": num_experts})


def slots_of(order: NewGeneration | WorkerReport, worker: str) -> SlotContents:
    """Contents of a worker that holds what the maps name."""
    if order.generation is None or order.placement is None:
        return ()
    devices = [m.device for m in order.generation.experts if m.name == worker]
    return tuple(b.physical_to_logical[d] for d in devices for b in order.placement.banks)


class FakeWorkerGroup:
    """Keeps the effects of a controller."""

    def __init__(self) -> None:
        self.cluster: Cluster | None = None
        """The controller's."""
        self.on_trace: Callable[[RecordTrace], None] = lambda trace: None
        self._sent: defaultdict[str, list[ControlFrame]] = defaultdict(list)
        self._started: list[tuple[Member, ExpertPlacement]] = []
        self._holders: list[tuple[ExpertHolder, ...]] = []
        self._ended: list[str] = []
        self._all_ended_asked = 0

    @property
    def sent(self) -> defaultdict[str, list[ControlFrame]]:
        """Frames by worker."""
        self._take()
        return self._sent

    @property
    def holders(self) -> list[tuple[ExpertHolder, ...]]:
        """Where each of ``started`` can read its experts."""
        self._take()
        return self._holders

    @property
    def started(self) -> list[tuple[Member, ExpertPlacement]]:
        self._take()
        return self._started

    @property
    def ended(self) -> list[str]:
        self._take()
        return self._ended

    @property
    def all_ended_asked(self) -> int:
        self._take()
        return self._all_ended_asked

    def _take(self) -> None:
        assert self.cluster is not None
        for effect in self.cluster.take_effects():
            match effect:
                case SendFrame(frame, workers):
                    for worker in workers:
                        self._sent[worker].append(frame)
                case StartWorker(member, placement, holders):
                    self._started.append((member, placement))
                    self._holders.append(holders)
                case EndWorkers(workers):
                    self._ended += workers
                case RecordTrace():
                    self.on_trace(effect)
                case EndAllWorkers():
                    self._all_ended_asked += 1

    def last(self, worker: str, kind: type[FrameT]) -> FrameT | None:
        """The newest frame of a kind that was sent to a worker."""
        found = [f for f in self.sent[worker] if isinstance(f, kind)]
        return found[-1] if found else None


class AtOnce(Executor):
    """Computes in the caller: the result is there when ``submit`` returns."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as err:  # the caller raises it when it takes the result
            future.set_exception(err)
        return future


class FakeCluster:
    """A controller, its fake workers and a clock that is moved by hand."""

    def __init__(
        self,
        num_attention: int = 1,
        num_experts: int = 2,
        *,
        num_redundant: int = 0,
        can_grow: bool = True,
        settings: ControllerSettings | None = None,
        config: ClusterConfig = CONFIG,
        executor: Executor | None = None,
        hosts: Mapping[str, str] | None = None,
        pools: Mapping[Role, int] | None = None,
    ) -> None:
        """``hosts``: the hosts of the workers by name; the controller is on ``head``. ``pools``:
        others than the two.
        """
        self.now = 100.0
        if not can_grow:
            config = dataclasses.replace(config, workers=WorkersSection(device="cuda"))
        self.link = FakeWorkerGroup()
        self.members = tuple(
            replace(member, node=(hosts or {}).get(member.name, ""))
            for member in members_of(pools or {"attention": num_attention, "expert": num_experts})
        )
        self.placement: ExpertPlacement = contiguous(BANKS, num_experts, num_redundant)
        self.controller = Controller(
            Cluster(
                self.members,
                self.placement,
                config,
                now=self.now,
                num_slots=max(len(row) for row in self.placement.banks[0].physical_to_logical),
                host="head",
                wall_time_offset_s=1_000_000.0,
                notes={"top_k": 2},
            ),
            settings or ControllerSettings(),
            executor or AtOnce(),
        )
        self.link.cluster = self.controller.cluster

    def disconnect(self, name: str, reason: str = "reset") -> None:
        """The control connection of a worker closes for good."""
        self.controller.disconnected(name, reason, True, self.now)

    @property
    def known(self) -> Cluster:
        """What the controller knows."""
        return self.controller.cluster

    @property
    def state(self) -> str:
        """The cluster's state."""
        return self.known.state.value

    def send(self, worker: str, frame: ControlFrame) -> None:
        """A worker sends a frame."""
        self.controller.frame(worker, frame, self.now)

    def register(
        self, worker: str, pid: int = 1, build: Build = BUILD, offer: ArithmeticOffer = OFFER
    ) -> None:
        """A worker calls for the first time."""
        address = f"10.0.0.1:{pid}"
        weights = address if worker.startswith("expert") else ""
        member = member_of(
            worker, pid=pid, data_address=address, weights_address=weights, offer=offer
        )
        self.send(worker, Register(member=member, build=build))

    def load_all(self, infos: Mapping[str, Mapping[str, object]] | None = None) -> None:
        """All workers register and have their weights; ``infos``: further facts of some."""
        for i, member in enumerate(self.members):
            self.register(member.name, pid=1000 + i)
        for member in self.members:
            info = {"max_model_len": 128, "vocab_size": 50} if member.role == "attention" else {}
            self.send(member.name, WorkerReady(info={**info, **(infos or {}).get(member.name, {})}))

    def join(self, worker: str, highest_step: int = 0, highest_epoch: int = 1) -> None:
        """A worker takes part in the newest generation that it was sent."""
        order = self.link.last(worker, NewGeneration)
        assert order is not None
        self.send(
            worker,
            GenerationReady(
                generation=order.generation.number,
                highest_step=highest_step,
                highest_epoch=highest_epoch,
                slots=slots_of(order, worker),
            ),
        )

    def join_all(self, highest_step: int = 0) -> None:
        """All members of the newest generation take part in it."""
        for member in self.known.generation.members:
            self.join(member.name, highest_step)

    def answer_loads(self, worker: str, error: str = "") -> int:
        """A worker carries out, or not, all load orders it has been given; how many experts."""
        orders = [f for f in self.link.sent[worker] if isinstance(f, LoadExperts)]
        for order in orders:
            self.link.sent[worker].remove(order)
            self.send(worker, ExpertsLoaded(order=order.order, error=error))
        return sum(len(order.experts) for order in orders)

    def started(self) -> list[str]:
        """Names of the workers that were asked for after the start."""
        return [member.name for member, _ in self.link.started]

    def bring_up(self, worker: str) -> None:
        """A worker that was asked for calls and loads."""
        self.register(worker)
        self.send(worker, WorkerReady())

    def serve(self) -> None:
        """The whole start."""
        self.load_all()
        self.join_all()
        assert self.state == "SERVING"

    def beat(
        self,
        worker: str,
        progress: int = 0,
        idle: bool = True,
        waiting: bool = False,
        behind: int = 0,
        stats: Mapping[str, float] | None = None,
        stalled_s: float | None = None,
        waits_for: tuple[str, ...] = (),
    ) -> None:
        """A worker's heartbeat; it is still in a generation ``behind`` the newest one."""
        self.send(
            worker,
            Heartbeat(
                progress=progress,
                idle=idle,
                waiting=waiting,
                generation=self.known.generation.number - behind,
                running=self.known.runs,
                epoch=self.known.placement.epoch,
                stats=dict(stats or {}),
                stalled_s=stalled_s,
                waits_for=waits_for,
            ),
        )

    def beat_all(self, *but: str) -> None:
        """Heartbeats of all workers that live, but some."""
        for record in self.known.workers:
            if not record.is_lost and record.name not in but:
                self.beat(record.name)

    def tick(self, seconds: float) -> None:
        """Time passes, in the controller's small steps."""
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now += min(0.1, end - self.now)
            self.controller.tick(self.now)

    def running(self) -> dict[str, RunGeneration]:
        """The newest run order of each worker that has one."""
        found = {m.name: self.link.last(m.name, RunGeneration) for m in self.members}
        return {name: order for name, order in found.items() if order is not None}
