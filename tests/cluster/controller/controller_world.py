"""A controller among workers that exist only here: their rules, without data, sockets or time.

``World`` holds what lives: at most one controller (or the failover to a restarted one) and
workers that follow ``workers/process/worker/worker.py``. Frames wait in inboxes until a test takes
them, so that every order of events can be made.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from benchmarks.harness.members import member_of
from cluster.config.cluster import ClusterConfig
from cluster.controller.cluster import Cluster
from cluster.controller.controller import Controller
from cluster.controller.effects import EndAllWorkers, EndWorkers, SendFrame, StartWorker
from cluster.controller.failover import ReportCollector
from cluster.controller.settings import ControllerSettings
from cluster.core.errors import NotReadyError, ProtocolError
from cluster.core.frames import (
    ControlFrame,
    ControllerSnapshot,
    ExpertsLoaded,
    GenerationReady,
    Heartbeat,
    HeartbeatAck,
    LoadExperts,
    NewGeneration,
    PeerLost,
    Register,
    RunGeneration,
    Shutdown,
    SlotContents,
    StatusReply,
    StatusRequest,
    WorkerReady,
    WorkerReport,
)
from cluster.core.placement import FREE_SLOT, ExpertPlacement, contiguous
from cluster.core.topology import Generation, Member
from tests.cluster.controller.fakes_cluster import BANKS, CONFIG, AtOnce, make_members
from workers.process.control.lease import TermGuard

SETTINGS = ControllerSettings()


@dataclass(slots=True)
class ModelWorker:
    """One worker as the controller meets it."""

    member: Member
    inbox: deque[ControlFrame] = field(default_factory=deque)
    """What has reached it and waits to be taken."""
    loads: deque[LoadExperts | ExpertPlacement] = field(default_factory=deque)
    """Work of its loader, in the background: orders, and maps outside of which slots are freed."""
    contents: dict[tuple[int, int], int] = field(default_factory=dict)
    """(bank, expert slot) -> the expert that is complete there."""
    is_dead: bool = False
    is_frozen: bool = False
    is_connected: bool = False
    is_up: bool = True
    """Its process has called a controller once."""
    disk_error: str = ""
    """Why it cannot read experts."""
    is_fenced: bool = False
    generation: Generation = field(default=Generation(number=0, members=()))
    order: NewGeneration | None = None
    """The newest that has reached it."""
    joined: NewGeneration | None = None
    """The newest that it has taken."""
    runs: bool = False
    epoch: int = 0
    highest_step: int = 0
    loss: PeerLost | None = None
    memory: dict[str, Any] = field(default_factory=dict)
    guard: TermGuard = field(default_factory=TermGuard)
    epochs: list[int] = field(default_factory=list)
    """Epochs that it has run, in order."""

    @property
    def name(self) -> str:
        return self.member.name

    def hold(self, placement: ExpertPlacement) -> ModelWorker:
        """It is started with its part of a placement."""
        self.contents = dict(self._row(placement))
        return self

    def _row(self, placement: ExpertPlacement) -> list[tuple[tuple[int, int], int]]:
        device = self.member.device
        return [
            ((place, slot), expert)
            for place, bank in enumerate(placement.banks if device >= 0 else ())
            for slot, expert in enumerate(bank.physical_to_logical[device])
            if expert != FREE_SLOT
        ]

    @property
    def slots(self) -> SlotContents:
        """As a worker reports them."""
        sizes = [max((s + 1 for b, s in self.contents if b == k), default=0) for k in range(2)]
        return tuple(
            tuple(self.contents.get((bank, slot), FREE_SLOT) for slot in range(size))
            for bank, size in enumerate(sizes)
        )

    @property
    def num_orders(self) -> int:
        """Load orders that are not carried out."""
        return sum(isinstance(work, LoadExperts) for work in self.loads)

    def load(self) -> ExpertsLoaded | None:
        """Its loader does the next piece of work; the answer to an order."""
        work = self.loads.popleft()
        if isinstance(work, ExpertPlacement):
            used = dict(self._row(work))
            self.contents = {place: e for place, e in self.contents.items() if place in used}
            return None
        error = self.disk_error
        if work.epoch < self.epoch:
            error = f"commanded in epoch {work.epoch}, but epoch {self.epoch} is current"
        if not error:
            self.contents |= {(bank, slot): expert for bank, slot, expert in work.experts}
        return ExpertsLoaded(order=work.order, error=error)

    def check_slots(self) -> None:
        """All experts of the maps that it runs are in their slots."""
        assert self.joined is not None
        row = self._row(self.joined.placement)
        assert dict(row).items() <= self.contents.items(), "no step in an empty slot"

    @property
    def is_awake(self) -> bool:
        return not self.is_dead and not self.is_frozen

    def standing(self) -> list[ControlFrame]:
        """What it says on a new connection."""
        order = self.order
        is_newest = order is not None and order.generation.number == self.generation.number
        frames: list[ControlFrame] = [
            Register(member=replace(self.member, pid=7)),
            WorkerReady(),
            WorkerReport(
                generation=order.generation if order is not None else None,
                placement=order.placement if order is not None else None,
                running=is_newest and self.runs and not self.is_fenced,
                highest_step=self.highest_step,
                highest_epoch=self.epoch,
                memory=self.memory,
                slots=self.slots,
            ),
        ]
        return frames if self.loss is None else [*frames, self.loss]

    def beat(self) -> Heartbeat:
        """Its heartbeat."""
        number = self.generation.number
        return Heartbeat(
            progress=0,
            idle=True,
            generation=number,
            running=self.runs and not self.is_fenced,
            epoch=self.epoch,
            fenced=self.is_fenced,
        )

    def receive(self, frame: ControlFrame) -> None:
        """The control thread's part: guards, and what needs no data thread."""
        if isinstance(frame, (HeartbeatAck, ControllerSnapshot, NewGeneration)):
            self.guard.check(frame.term, frame.controller)
        if isinstance(frame, NewGeneration):
            self.order = frame
        if (
            isinstance(frame, RunGeneration)
            and self.order is not None
            and self.order.generation.number == frame.generation
        ):
            self.loads.append(self.order.placement)
        if isinstance(frame, ControllerSnapshot):
            self.memory = frame.memory
        elif isinstance(frame, LoadExperts):
            self.loads.append(frame)
        elif not isinstance(frame, HeartbeatAck):
            self.inbox.append(frame)

    def take(self) -> list[ControlFrame]:
        """The data thread's part: handle the next frame; returns the answers."""
        frame = self.inbox.popleft()
        match frame:
            case NewGeneration():
                return self._join(frame)
            case RunGeneration() if frame.generation == self.generation.number:
                assert frame.first_step > self.highest_step, "steps are numbered above all seen"
                self.runs = True
                self.epochs.append(self.epoch)
                self.check_slots()
            case StatusRequest():
                return [StatusReply(token=frame.token, stats={"num_requests_running": 0.0})]
            case Shutdown():
                self.is_dead = True
        return []

    def _join(self, frame: NewGeneration) -> list[ControlFrame]:
        generation = frame.generation
        if generation.number <= self.generation.number:
            return []
        assert self.name in {m.name for m in generation.members}
        placement = frame.placement
        assert placement.epoch >= self.epoch, "epochs only grow"
        self.runs, self.is_fenced, self.loss = False, False, None
        self.generation, self.epoch, self.joined = generation, placement.epoch, frame
        return [
            GenerationReady(
                generation=generation.number,
                highest_step=self.highest_step,
                highest_epoch=self.epoch,
                slots=self.slots,
            )
        ]


class World:
    """Everything that lives, and a clock moved by hand."""

    def __init__(
        self,
        num_attention: int,
        num_experts: int,
        num_redundant: int,
        config: ClusterConfig = CONFIG,
    ) -> None:
        self.now = 100.0
        self._config = config
        self.members = make_members(num_attention, num_experts)
        self.placement = contiguous(BANKS, num_experts, num_redundant)
        self.workers = {m.name: ModelWorker(m).hold(self.placement) for m in self.members}
        self.controller: Controller | None = None
        self.collector: ReportCollector | None = None
        self.ended: set[str] = set()
        """Workers whose processes the controller wants to be ended."""
        self.lost: set[str] = set()
        """Workers that any controller has declared lost."""
        self.progress = (0, 0, 0)
        self._count = 0
        self._expected: set[str] = set()
        self._start()

    # ---- effects of the controller ------------------------------------------------------------

    def carry_out(self) -> None:
        """All effects of the controller until now."""
        while self.controller is not None and (effects := self.controller.cluster.take_effects()):
            for effect in effects:
                match effect:
                    case SendFrame(frame, workers):
                        for worker in workers:
                            self.send(worker, frame)
                    case StartWorker(member, placement):
                        self.start_worker(member, placement)
                    case EndWorkers(workers):
                        self.end_workers(workers)
                    case EndAllWorkers():
                        raise AssertionError("no test ends the cluster")

    def send(self, worker: str, frame: ControlFrame) -> None:
        if isinstance(frame, NewGeneration):
            names = {m.name for m in frame.generation.members}
            assert not names & self.lost, "a lost worker never comes back"
        model = self.workers.get(worker)  # none is there until it has started
        if model is not None and model.is_connected and not model.is_dead:
            try:
                model.receive(frame)
            except ProtocolError:
                self._hang_up(model)

    def start_worker(self, member: Member, placement: ExpertPlacement) -> None:
        earlier = self.workers.get(member.name)
        assert earlier is None or earlier.is_dead, "a name is for one living worker"
        assert earlier is None or member.name not in self.lost, "who was lost never comes back"
        self.workers[member.name] = ModelWorker(member, is_up=False).hold(placement)

    def end_workers(self, workers: Sequence[str]) -> None:
        self.ended |= set(workers)
        for name in workers:
            self.workers[name].is_connected = False

    # ---- what happens ---------------------------------------------------------------------

    def come_up(self, name: str) -> None:
        """A worker that was started calls the controller, with its weights in place."""
        model = self.workers[name]
        if model.is_up or self.controller is None or not model.is_awake:
            return
        model.is_up = model.is_connected = True
        self.tell(name, Register(member=member_of(name, pid=8)))
        self.tell(name, WorkerReady())

    def crash(self, name: str) -> None:
        """A worker's process dies."""
        model = self.workers[name]
        model.is_dead = True
        if model.is_up:
            self._hang_up(model)
        elif self.controller is not None:
            self.controller.lost({name: "its process died"}, self.now)
            self.carry_out()

    def reap(self) -> None:
        """The processes that were to be ended are gone."""
        for name in self.ended:
            self.workers[name].is_dead = True
        if self.controller is not None:
            self.controller.draining.ended(sorted(self.ended), self.now)
            self.carry_out()

    def crash_controller(self, num_unsent: int) -> None:
        """It is gone; each worker misses the last few frames that were on their way."""
        self.carry_out()
        self.controller = self.collector = None
        for model in self.workers.values():
            model.is_connected = False
            model.is_dead = model.is_dead or not model.is_up  # there is nobody to call
            for _ in range(min(num_unsent, len(model.inbox))):
                model.inbox.pop()
            orders = [f for f in model.inbox if isinstance(f, NewGeneration)]
            model.order = orders[-1] if orders else model.joined

    def restart_controller(self) -> None:
        """Another one looks for workers; frozen processes are found too."""
        found = [n for n, w in self.workers.items() if not w.is_dead and n not in self.ended]
        self.collector = ReportCollector(
            found, self.now, limit_s=SETTINGS.collect_limit_s, confirm_s=SETTINGS.confirm_s
        )
        self._expected = set(found)

    def awaits(self, model: ModelWorker) -> bool:
        """The restarted controller has found this worker, which has not called yet."""
        return model.is_awake and not model.is_connected and model.name in self._expected

    def greet(self, name: str) -> None:
        """A worker has got the address of the new controller, and calls it."""
        model = self.workers[name]
        assert self.collector is not None
        model.is_connected = True
        for frame in model.standing():
            self.collector.frame(name, frame, self.now)

    def settle(self) -> None:
        """The failover ends if it can."""
        if self.collector is None or not self.collector.is_complete(self.now):
            return
        collector, self.collector = self.collector, None
        try:
            collected = collector.result()
        except NotReadyError:  # it begins again, at another address
            for model in self.workers.values():
                model.is_connected = False
            self.restart_controller()
            return
        if collected is None:
            self.controller = None
            return
        self._count += 1
        # What only the dead knew is forgotten.
        living = [w for w in self.workers.values() if w.is_connected]
        known = {lost["member"]["name"] for w in living for lost in w.memory.get("lost", ())}
        self.lost &= known
        self.controller = Controller(
            Cluster(
                collected.members,
                collected.placement,
                self._config,
                now=self.now,
                term=self._count + 1,
                identity=str(self._count),
            ),
            SETTINGS,
            AtOnce(),
        )
        self.controller.restore(collected, self.now)
        self.carry_out()

    def tell(self, name: str, frame: ControlFrame) -> None:
        """A worker's frame arrives, if it is connected."""
        model = self.workers[name]
        if not model.is_connected:
            return
        if self.controller is not None:
            self.controller.frame(name, frame, self.now)
            self.carry_out()
        elif self.collector is not None:
            self.collector.frame(name, frame, self.now)

    def take(self, name: str) -> None:
        """A worker handles the next frame that has reached it."""
        model = self.workers[name]
        for answer in model.take():
            self.tell(name, answer)
        if model.is_dead:
            self._hang_up(model)

    def take_all(self, *names: str) -> None:
        """One worker after the other handles all that has reached it, if it is awake."""
        for name in names:
            model = self.workers[name]
            while model.is_awake and model.inbox:
                self.take(name)

    def load(self, name: str) -> None:
        """A worker's loader carries out all its orders."""
        model = self.workers[name]
        while model.is_awake and model.loads:
            if (answer := model.load()) is not None:
                self.tell(name, answer)

    def step(self, count: int) -> None:
        """The generation that can runs some steps."""
        for number in self.runnable():
            for model in self.workers.values():
                if model.generation.number == number and model.runs:
                    model.highest_step += count

    def tick(self, seconds: float) -> None:
        """Time passes, in the controller's small steps."""
        for _ in range(round(seconds * 10)):
            self.now += 0.1
            self.settle()
            if self.controller is not None:
                self.controller.tick(self.now)
                self.carry_out()

    def beat(self) -> None:
        """Every worker that is awake and connected sends a heartbeat."""
        for name, model in list(self.workers.items()):
            if model.is_awake:
                self.tell(name, model.beat())

    def calm_down(self) -> None:
        """Nothing more goes wrong; time enough for everything to be noticed and answered."""
        self.reap()
        if self.controller is None and self.collector is None:
            self.restart_controller()
        for _ in range(120):
            for name in list(self.workers):
                self.come_up(name)
            if self.collector is not None:
                for name, model in self.workers.items():
                    if self.awaits(model):
                        self.greet(name)
            for name in list(self.workers):
                self.take_all(name)
                self.load(name)
            self.beat()
            self.tick(0.5)
            self.reap()

    # ---- what must be so ------------------------------------------------------------------

    def runnable(self) -> list[int]:
        """Generations that could commit a step: all their members are there and run them."""
        joined = {w.generation.number: w.joined for w in self.workers.values() if w.runs}
        return [n for n, order in joined.items() if order is not None and self._can_run(order)]

    def _can_run(self, order: NewGeneration) -> bool:
        members = [self.workers[m.name] for m in order.generation.members]
        return all(
            m.is_awake
            and m.runs
            and m.joined is not None
            and m.joined.generation == order.generation
            for m in members
        )

    def check(self) -> None:
        """The invariants."""
        assert len(self.runnable()) <= 1, "one generation at a time"
        for number in self.runnable():
            for model in self.workers.values():
                if model.runs and model.generation.number == number:
                    model.check_slots()
        known: dict[int, NewGeneration] = {}
        for model in self.workers.values():
            assert model.epochs == sorted(model.epochs)
            if model.joined is not None and model.is_awake and model.name not in self.lost:
                other = known.setdefault(model.generation.number, model.joined)
                assert other.generation == model.joined.generation
                assert other.placement == model.joined.placement
        controller = self.controller
        if controller is None:
            return
        snapshot = controller.snapshot()
        lost = {w["name"] for w in snapshot["workers"] if w["state"] in ("LOST", "DRAINED")}
        assert self.lost <= lost, "a lost worker stays lost"
        self.lost = lost
        progress = (snapshot["term"], snapshot["generation"], snapshot["placement_epoch"])
        if progress[0] > self.progress[0]:  # frames of the earlier controller may be lost
            numbers = [w.generation.number for w in self.workers.values() if w.is_connected]
            assert progress[1] >= max(numbers, default=0)
        else:
            assert all(a >= b for a, b in zip(progress, self.progress, strict=True))
        self.progress = progress
        if controller.cluster.runs:
            members = controller.cluster.generation.members
            devices = {m.device for m in members if m.holds_experts}
            for bank in controller.cluster.placement.banks:
                assert set(bank.decode_device) <= devices, "each expert has a copy"
            states = {w["name"]: w["state"] for w in snapshot["workers"]}
            assert all(states[m.name] in ("SERVING", "DRAINING") for m in members)
            assert snapshot["experts_complete"]

    def check_calm(self) -> None:
        """After ``calm_down``: those that live serve, or the state says what is missing."""
        controller = self.controller
        if controller is None:
            return  # no worker was left
        snapshot = controller.snapshot()
        assert snapshot["state"] in ("SERVING", "DEGRADED"), snapshot["state"]
        alive = {r.name for r in controller.cluster.workers.alive()}
        assert alive == {n for n, w in self.workers.items() if w.is_awake and w.is_connected}
        has_attention = any(self.workers[n].member.runs_attention for n in alive)
        if snapshot["experts_complete"] and has_attention:
            (number,) = self.runnable()
            assert number == snapshot["generation"]
            assert {m.name for m in controller.cluster.generation.members} == alive
            assert {self.workers[n].epoch for n in alive} == {snapshot["placement_epoch"]}

    # ---- small things ---------------------------------------------------------------------

    def _hang_up(self, model: ModelWorker) -> None:
        """Its connection closes; the controller sees it."""
        if not model.is_connected:
            return
        model.is_connected = False
        if self.controller is not None:
            self.controller.disconnected(model.name, "reset", True, self.now)
            self.carry_out()
        elif self.collector is not None:
            self.collector.gone(model.name, self.now)

    def _start(self) -> None:
        self.controller = Controller(
            Cluster(
                self.members,
                self.placement,
                self._config,
                now=self.now,
                identity="0",
            ),
            SETTINGS,
            AtOnce(),
        )
        for name, model in self.workers.items():
            model.is_connected = True
            self.tell(name, Register(member=member_of(name, pid=7)))
        for name in self.workers:
            self.tell(name, WorkerReady())
        for _ in range(2):
            self.take_all(*self.workers)
        assert self.runnable() == [1]
