"""The controller's state machine: events in, frames and orders out. No Ray, no sockets, no clock.

The life of a generation:

    all workers ready, or some lost ─▶ NewGeneration to every member ─▶ GenerationReady from all
        ─▶ RunGeneration(first step above the highest any member saw) ─▶ SERVING or DEGRADED

A further loss on the way starts the next generation. Every method is called from one thread;
``now`` is in monotonic seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

from cluster.adoption import Adopted
from cluster.config import ClusterConfig, LoadSection
from cluster.control_frames import (
    ControlFrame,
    DrainWish,
    EpochReady,
    EpochSwitched,
    ExpertsLoaded,
    GenerationReady,
    Heartbeat,
    HeartbeatAck,
    LoadProgress,
    PeerLost,
    Register,
    Shutdown,
    StatusReply,
    StatusRequest,
    WorkerFailed,
    WorkerReady,
)
from cluster.controller_settings import ControllerSettings
from cluster.coverage import stage_on
from cluster.detection import Detection
from cluster.draining import Draining
from cluster.errors import ProtocolError
from cluster.failure import FailureDecision, describe_members
from cluster.generation_round import GenerationRound, Phase
from cluster.generations import Generations
from cluster.history import History
from cluster.load_report import LoadReport
from cluster.load_tracker import LoadTracker
from cluster.migrations import Migrations
from cluster.operations import Operations
from cluster.placement import ExpertPlacement
from cluster.planner.stages import Stage
from cluster.rebalancing import Rebalancing
from cluster.recovery import Recovery, RecoveryLimits
from cluster.states import ClusterState, WorkerState, next_cluster_state
from cluster.succession import Succession
from cluster.topology import Generation, Member
from cluster.worker_link import WorkerLink
from cluster.worker_record import WorkerRecord
from cluster.worker_table import WorkerTable

logger = logging.getLogger(__name__)

_VERSIONS_OF_A_TERM = 1_000_000
"""So that the versions of a restarted controller's snapshots are new to everyone."""


class Controller:
    """One cluster's membership, states and recovery."""

    def __init__(
        self,
        settings: ControllerSettings,
        *,
        members: Sequence[Member],
        placement: ExpertPlacement,
        model: Mapping[str, Any],
        link: WorkerLink,
        now: float,
        num_slots: int = 0,
        room: int | None = None,
        load: LoadSection | None = None,
        config: ClusterConfig | None = None,
        top_k: int = 1,
        mode: str = "disaggregated",
        mode_reason: str = "",
        term: int = 1,
        identity: str = "",
        notes: Mapping[str, Any] | None = None,
        wall_time_offset_s: float = 0.0,
        executor: Executor | None = None,
    ) -> None:
        """``config`` and ``top_k`` are for rebalancing, which is off without them; ``executor``
        is what plans are made by (None: at once).

        ``model`` holds name and path; the workers add the rest. ``mode`` and why it was
        chosen (if nobody asked for it) are told in snapshots. ``identity`` tells controllers of
        one ``term`` apart; ``notes`` are for the next one (``adoption.Adopted.memory``). ``room``
        as for ``Recovery``.

        ``wall_time_offset_s`` added to ``now`` is the time of day.
        """
        self.state = ClusterState.STARTING
        self.error: str | None = None
        self.placement = placement
        self.version = (term - 1) * _VERSIONS_OF_A_TERM + 1
        self.workers = WorkerTable(members, num_slots=num_slots, model=model, now=now)
        self._num_slots = num_slots
        self._mode = mode
        self._mode_reason = mode_reason
        self._link = link
        self._term = term
        self._identity = identity
        self._succession = Succession(self, link, term=term, identity=identity, notes=notes or {})
        self.history = History(wall_time_offset_s)
        self.load = LoadTracker(load or LoadSection(), now)
        """Expert load of the cluster."""
        self.migrations = Migrations()
        """Weights that moved."""
        self.generations = Generations(self, term=term, identity=identity, now=now)
        """The newest one, being formed or running."""
        self.detection = Detection(self, settings, now)
        self.recovery = Recovery(
            self,
            members,
            placement,
            room=room,
            limits=RecoveryLimits(start_limit_s=settings.start_limit_s),
            first_order=(term << 32) + 1,
        )
        self.operations = Operations(term, wall_time_offset_s, self.remember)
        self.draining = Draining(self, self.operations)
        self.rebalancing = Rebalancing(
            self,
            self.operations,
            config,
            num_slots=num_slots,
            top_k=top_k,
            now=now,
            executor=executor,
        )

    # ---- events ---------------------------------------------------------------------------

    def frame(self, name: str, frame: ControlFrame, now: float) -> None:
        """A worker sent a frame. Raises ``ProtocolError`` when it has no place here."""
        record = self.workers.find(name)
        if record.is_lost or self.state in (ClusterState.DRAINING, ClusterState.STOPPED):
            self._link.send(name, Shutdown(reason=record.reason or "the cluster is ending"))
            return
        record.heard_at = now
        match frame:
            case Heartbeat():
                record.beat(frame, now)
                self._take_load(name, frame)
                ack = HeartbeatAck(term=self._term, controller=self._identity, number=frame.number)
                self._link.send(name, ack)
                if frame.fenced and frame.generation == self.round.number:
                    self._fenced(record, now)
            case StatusReply():
                self._take_load(name, frame)
                self.workers.take_status(name, frame)
            case Register():
                record.register(frame)
                record.since = now
                self.touch()
            case LoadProgress():
                record.load(frame)
                self.touch()
            case WorkerReady():
                record.ready(frame)
                self._worker_ready(record, now)
            case WorkerFailed():
                self.lost({name: frame.reason}, now)
            case PeerLost():
                self.detection.peer_lost(name, frame, now)
            case GenerationReady():
                self.generations.answer(name, frame, now)
            case ExpertsLoaded() if self.recovery.loaded(name, frame, now):
                pass  # an order of ours
            case ExpertsLoaded() | EpochReady() | EpochSwitched():
                if not self.draining.frame(name, frame, now):
                    self.rebalancing.frame(name, frame, now)
            case DrainWish():
                self.draining.wish(name, now)
            case _:
                raise ProtocolError(f"{name} sent {type(frame).__name__}")

    def disconnected(self, name: str, reason: str, now: float) -> None:
        """The control connection of a worker closed: its process is gone, or as good as gone."""
        if name in self.workers:
            self.lost({name: f"its control connection closed ({reason})"}, now)

    def lost(self, reasons: Mapping[str, str], now: float) -> None:
        """Workers (name -> reason) are gone, or are declared so."""
        fresh = {n: r for n, r in reasons.items() if not self.workers[n].is_lost}
        if not fresh:
            return
        for name, reason in fresh.items():
            logger.warning("lost %s: %s", name, reason)
            self.workers.lose(name, reason)
            self.round.drop_reports(name)
        self.draining.lost(fresh, now)
        self.touch()
        self._succession.send_keepsake()  # before any generation without them
        if self.state is ClusterState.STARTING:
            self.fail_start("; ".join(f"{n}: {r}" for n, r in fresh.items()), now)
        elif self.state not in (ClusterState.DRAINING, ClusterState.STOPPED):
            for name, reason in fresh.items():
                self._link.send(name, Shutdown(reason=f"declared lost: {reason}"))
            self.recovery.lost(fresh, now)
            self._link.end_workers(list(fresh))

    def fail_start(self, error: str, now: float) -> None:
        """The start cannot succeed: end what exists, keep the reason. Nothing after the start."""
        if self.state is ClusterState.STARTING:
            self.error = error
            self.stop(now, f"the start failed: {error}")

    def tick(self, now: float) -> None:
        """Time has passed: look for limits that are exceeded. Called several times a second."""
        self.detection.credit_own_pause(now)
        self.draining.tick(now)
        if self.state in (ClusterState.DRAINING, ClusterState.STOPPED):
            return
        self.load.tick(now)
        self.rebalancing.tick(now)
        self.detection.tick(now)
        self.recovery.tick(now)

    def stop(self, now: float, reason: str = "stopped") -> None:
        """End every worker. The state is STOPPED once they are gone."""
        if self.state in (ClusterState.DRAINING, ClusterState.STOPPED):
            return
        self._enter(ClusterState.DRAINING)
        self.history.add(self.round.number, now, reason, "end all workers")
        for record in self.workers.alive():
            self._link.send(record.name, Shutdown(reason=reason))
        self._link.end_all()

    def all_ended(self, now: float) -> None:
        """Every worker process is gone."""
        for record in self.workers.alive():
            record.enter(WorkerState.LOST, "ended")
        if self.state is ClusterState.DRAINING:
            self._enter(ClusterState.STOPPED)

    # ---- questions ------------------------------------------------------------------------

    def request_status(self) -> None:
        """Ask every worker for its numbers; ``workers.status_complete`` tells when they came."""
        if self.state in (ClusterState.DRAINING, ClusterState.STOPPED):
            return
        request, asked = self.workers.ask_status()
        for name in asked:
            self._link.send(name, request)

    @property
    def round(self) -> GenerationRound:
        """The newest generation and its answers; number 0 before the first."""
        return self.generations.round

    @property
    def generation(self) -> Generation:
        """The newest generation; number 0 before the first."""
        return self.round.generation

    def snapshot(self) -> dict[str, Any]:
        """The cluster's state, fit for JSON (``status --json``)."""
        return {
            "version": self.version,
            "schema": 1,
            "state": self.state.value,
            "error": self.error,
            "mode": self._mode,
            "mode_reason": self._mode_reason,
            "term": self._term,
            "generation": self.round.number,
            "placement_epoch": self.placement.epoch,
            "experts_complete": self.generations.experts_complete,
            "model": self.workers.model,
            "rebalance": self.rebalancing.to_dict(),
            "workers": [r.to_dict() for r in self.workers],
            "gateway": [],
            "problems": self.recovery.problems(self.detection.last_tick),
            "recoveries": self.recovery.stalls.to_dict(),
            "migrations": self.migrations.to_dict(),
            "history": self.history.to_list(),
        }

    # ---- a restarted controller -----------------------------------------------------------

    def adopt(self, adopted: Adopted, now: float) -> None:
        """Take over workers that run; the first thing that is done to a restarted controller."""
        self.state = ClusterState.RECOVERING
        self._succession.adopt(adopted, now)

    def show_running(self) -> None:
        """See ``SuccessionHost``."""
        is_full = self.recovery.replacements.is_full(self.round.members)
        self._enter(ClusterState.SERVING if is_full else ClusterState.DEGRADED)

    # ---- start ----------------------------------------------------------------------------

    def _worker_ready(self, record: WorkerRecord, now: float) -> None:
        self.touch()
        self.workers.learn_model(record)
        if self.state is not ClusterState.STARTING:
            self.recovery.ready(now)
        elif all(r.state is WorkerState.READY for r in self.workers):
            members = tuple(r.member for r in self.workers)
            self.history.add(1, now, "start", f"serve with {describe_members(members)}")
            self.generations.begin(members, self.placement, now)

    # ---- generations ----------------------------------------------------------------------

    def _fenced(self, record: WorkerRecord, now: float) -> None:
        """A member has stopped by itself: its lease ran out while we were away."""
        if record.state is WorkerState.SERVING:
            self.reform(f"the lease of {record.name} ran out", now)

    def run_if_ready(self, now: float) -> None:
        """See ``RecoveryHost``."""
        self.generations.run_if_ready(now)

    def above(self, placement: ExpertPlacement) -> ExpertPlacement:
        """See ``GenerationsHost``."""
        return self.rebalancing.above(placement)

    @property
    def awaits_experts(self) -> bool:
        """See ``GenerationsHost``."""
        return self.recovery.reloads.is_pending

    def ran(self, first_step: int, now: float) -> None:
        """See ``GenerationsHost``."""
        self.show_running()
        self.history.runs(self.round.number, first_step, now)
        self._succession.send_keepsake()
        self.recovery.ran(now)

    @property
    def is_forming(self) -> bool:
        """A generation is announced and does not run yet."""
        return self.generations.is_forming

    # ---- losses ---------------------------------------------------------------------------

    def form(self, decision: FailureDecision, now: float) -> None:
        """See ``RecoveryHost``."""
        self.generations.experts_complete = decision.experts_complete
        if self.state is not ClusterState.RECOVERING:
            self._enter(ClusterState.RECOVERING)
        self.generations.begin(decision.members, decision.placement, now)
        self.history.add(self.round.number, now, decision.cause, decision.effect)

    def stall(self, decision: FailureDecision, now: float) -> None:
        """See ``RecoveryHost``: say so, and keep the members for a later recovery."""
        self.generations.experts_complete = decision.experts_complete
        self.generations.stall(decision.members, now)
        self.note(decision.cause, decision.effect, now)
        self.settle()
        self._succession.send_keepsake()

    def settle(self) -> None:
        """See ``RecoveryHost``: requests wait as long as there is hope."""
        hopeful = self.recovery.is_hopeful
        state = ClusterState.RECOVERING if hopeful else ClusterState.DEGRADED
        if self.state is not state:
            self._enter(state)

    def start_worker(self, member: Member, placement: ExpertPlacement) -> None:
        """See ``RecoveryHost``."""
        logger.info("start %s", member.name)
        self.touch()
        self._link.start_worker(member, placement)

    def expert_load(self) -> dict[tuple[str, int], list[float]]:
        """See ``RecoveryHost``."""
        sums = self.load.totals()
        keys = set(sums.prefill) & set(sums.decode)
        return {key: sums.counts(key).tolist() for key in keys}

    # ---- what a drain and a rebalancing ask for ---------------------------------------------

    def send(self, name: str, frame: ControlFrame) -> None:
        """Send to a worker."""
        self._link.send(name, frame)

    def come_into_force(self, placement: ExpertPlacement) -> None:
        """This placement is in force: a step of the running generation names its epoch."""
        self.placement = placement
        self.recovery.moved(placement)
        self.touch()

    def reform(self, cause: str, now: float) -> None:
        """Have all members form a generation with the placement that is known here."""
        if self.state is not ClusterState.RECOVERING:
            self._enter(ClusterState.RECOVERING)
        self.generations.begin(self.round.members, self.placement, now)
        effect = f"go on with {describe_members(self.round.members)}"
        self.history.add(self.round.number, now, cause, effect)

    @property
    def takes_orders(self) -> bool:
        """The cluster is neither starting nor ending."""
        return self.state is not ClusterState.STARTING and self.is_up

    @property
    def is_up(self) -> bool:
        """Nothing has ended the cluster yet."""
        return self.state not in (ClusterState.DRAINING, ClusterState.STOPPED)

    @property
    def runs(self) -> bool:
        """The newest generation runs, and every expert has a copy."""
        return self.round.phase is Phase.RUNNING and self.is_up

    def stage_without(self, devices: Collection[int]) -> Stage:
        """A placement that does not use these devices, and what must be loaded for it.

        Raises ``ConflictError`` when the others have no room.
        """
        others = {m.device for m in self.round.generation.experts} - set(devices)
        grows = all(str(r.info.get("device", "cpu")) == "cpu" for r in self.workers.alive())
        return stage_on(others, self.placement, None if grows else self._num_slots)

    def touch(self) -> None:
        """Something that snapshots show has changed."""
        self.version += 1

    def note(self, cause: str, effect: str, now: float) -> None:
        """Add to the history."""
        self.history.add(self.round.number, now, cause, effect)
        self.touch()

    def ask_numbers(self, name: str) -> None:
        """Have a worker tell its numbers soon."""
        self._link.send(name, StatusRequest(token=0))

    def hold_back(self, names: Sequence[str], drains: bool) -> None:
        """Tell the gateways that these workers are (not) for requests."""
        for name in names:
            self.workers[name].drains = drains
        self.touch()

    def leave(self, names: Sequence[str], why: str, now: float) -> None:
        """Form a generation without these workers, which are workers no more."""
        leaving = {m.device for m in self.round.members if m.name in names and m.holds_experts}
        members = tuple(m for m in self.round.members if m.name not in names)
        placement = self.placement
        if leaving:
            kept = placement.without_devices(frozenset(leaving), placement.epoch + 1)
            assert kept is not None, "a drain leaves every expert a copy"
            placement = kept
        for name in names:
            self.workers.lose(name, why, WorkerState.DRAINED)
            self.recovery.replacements.leave(name)
            self.round.drop_reports(name)
        self._enter(ClusterState.RECOVERING)
        self._succession.send_keepsake()
        self.generations.begin(members, placement, now)
        effect = f"go on with {describe_members(members)}, placement epoch {placement.epoch}"
        self.history.add(self.round.number, now, why, effect)

    def end(self, names: Sequence[str]) -> None:
        """End the processes of workers that have left."""
        for name in names:
            self._link.send(name, Shutdown(reason="drained"))
        self._link.end_workers(names)

    def refill(self, names: Sequence[str]) -> None:
        """Start new workers for the places of these."""
        for name in names:
            member = self.workers[name].member
            self.recovery.replacements.reopen(member.role, member.rank)

    def remember(self) -> None:
        """Have the workers keep what a restarted controller must know."""
        self.touch()
        self._succession.send_keepsake()

    # ---- small things ---------------------------------------------------------------------

    def _take_load(self, name: str, frame: Heartbeat | StatusReply) -> None:
        if frame.expert_load:
            self.load.take(name, LoadReport.from_dict(frame.expert_load))

    def _enter(self, state: ClusterState) -> None:
        logger.info("%s -> %s", self.state.value, state.value)
        self.state = next_cluster_state(self.state, state)
        self.touch()
