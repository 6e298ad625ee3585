"""The controller's state machine: events in, frames and orders out. No Ray, no sockets, no clock.

The life of a generation:

    all workers ready, or some lost ─▶ NewGeneration to every member ─▶ GenerationReady from all
        ─▶ RunGeneration(first step above the highest any member saw) ─▶ SERVING or DEGRADED

A further loss before the end starts the next generation. Every method is called from one thread;
``now`` is in monotonic seconds.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

from cluster.config.cluster import ClusterConfig, LoadSection
from cluster.controller.drain.drain import Draining
from cluster.controller.failover.collect import CollectedState
from cluster.controller.failover.restore import StateRestorer
from cluster.controller.parts.detection import Detection
from cluster.controller.parts.event_log import History
from cluster.controller.parts.generation import Generations
from cluster.controller.parts.generation_round import GenerationRound, Phase
from cluster.controller.parts.metrics import ControllerMetrics
from cluster.controller.parts.operations import Operations
from cluster.controller.parts.recovery import Recovery
from cluster.controller.parts.settings import ControllerSettings
from cluster.controller.parts.worker_link import WorkerLink
from cluster.controller.parts.worker_record import WorkerRecord
from cluster.controller.parts.worker_table import WorkerTable
from cluster.controller.rebalance.loop import Rebalancing
from cluster.core.errors import ProtocolError
from cluster.core.frames import (
    ControlFrame,
    DrainRequest,
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
    WorkerFailed,
    WorkerReady,
)
from cluster.core.placement import ExpertPlacement
from cluster.core.states import ClusterState, WorkerState, next_cluster_state
from cluster.core.topology import Generation, Member
from cluster.load.tracker import LoadTracker
from cluster.planner.stages import Stage
from cluster.policy.coverage import stage_on
from cluster.policy.failure import FailureDecision, describe_members

logger = logging.getLogger(__name__)

_VERSIONS_OF_A_TERM = 1_000_000
"""Distance between the terms, so that a restarted controller never repeats a version."""


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
        computes its plans (None: the caller does).

        ``model`` holds name and path; the workers add the rest. Snapshots show ``mode`` and
        ``mode_reason``, why it was chosen. ``identity`` distinguishes controllers of one ``term``;
        ``notes`` are for the next controller (``collector.CollectedState.memory``).
        ``room`` as for ``Recovery``.

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
        self._restorer = StateRestorer(self, link, term=term, identity=identity, notes=notes or {})
        self.history = History(wall_time_offset_s)
        self.load = LoadTracker(load or LoadSection(), now)
        """Expert load of the cluster."""
        self.metrics = ControllerMetrics()
        """Weights that moved."""
        self.generations = Generations(self, term=term, identity=identity, now=now)
        """The newest one, being formed or running."""
        self.detection = Detection(self, settings, now)
        self.recovery = Recovery(
            self,
            members,
            placement,
            room=room,
            limits=settings,
            first_order=(term << 32) + 1,
        )
        self.operations = Operations(term, wall_time_offset_s, self.remember)
        self.rebalancing = Rebalancing(
            self,
            self.operations,
            config,
            num_slots=num_slots,
            top_k=top_k,
            now=now,
            executor=executor,
        )
        self.draining = Draining(self, self.operations, self.rebalancing)

    # ---- events ---------------------------------------------------------------------------

    def frame(self, name: str, frame: ControlFrame, now: float) -> None:
        """A worker sent a frame. Raises ``ProtocolError`` for an unexpected one."""
        record = self.workers.find(name)
        if record.is_lost or not self.is_up:
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
                pass  # an order of a recovery
            case ExpertsLoaded() | EpochReady() | EpochSwitched():
                if not self.draining.frame(name, frame, now):
                    self.rebalancing.frame(name, frame, now)
            case DrainRequest():
                self.draining.requested(name, now)
            case _:
                raise ProtocolError(f"{name} sent {type(frame).__name__}")

    def disconnected(self, name: str, reason: str, now: float) -> None:
        """The control connection of a worker closed: its process has ended or cannot be reached."""
        if name in self.workers:
            self.lost({name: f"its control connection closed ({reason})"}, now)

    def lost(self, reasons: Mapping[str, str], now: float) -> None:
        """Declare workers (name -> reason) lost."""
        fresh = {n: r for n, r in reasons.items() if not self.workers[n].is_lost}
        if not fresh:
            return
        for name, reason in fresh.items():
            logger.warning("lost %s: %s", name, reason)
            self.workers.lose(name, reason)
            self.round.drop_reports(name)
        self.draining.lost(fresh, now)
        self.touch()
        self._restorer.send_snapshot()  # before any generation without them
        if self.state is ClusterState.STARTING:
            self.fail_start("; ".join(f"{n}: {r}" for n, r in fresh.items()), now)
        elif self.is_up:
            for name, reason in fresh.items():
                self._link.send(name, Shutdown(reason=f"declared lost: {reason}"))
            self.recovery.lost(fresh, now)
            self._link.end_workers(list(fresh))

    def fail_start(self, error: str, now: float) -> None:
        """The start cannot succeed: end what exists, keep the reason. No effect after the start."""
        if self.state is ClusterState.STARTING:
            self.error = error
            self.stop(now, f"the start failed: {error}")

    def tick(self, now: float) -> None:
        """Time has passed: check all limits. Called several times a second."""
        self.detection.credit_own_pause(now)
        self.draining.tick(now)
        if not self.is_up:
            return
        self.load.tick(now)
        self.rebalancing.tick(now)
        self.detection.tick(now)
        self.recovery.tick(now)

    def stop(self, now: float, reason: str = "stopped") -> None:
        """End every worker. The state is STOPPED once they are gone."""
        if not self.is_up:
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
        """Ask every worker for its numbers; ``workers.status_complete`` says when all came."""
        if not self.is_up:
            return
        request, asked = self.workers.ask_status()
        for name in asked:
            self._link.send(name, request)

    @property
    def round(self) -> GenerationRound:
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
            "metrics": self.metrics.to_plain({r.member.role for r in self.workers}),
            "history": self.history.to_list(),
        }

    # ---- a restarted controller -----------------------------------------------------------

    def restore(self, collected: CollectedState, now: float) -> None:
        """Continue with running workers; the first call to a restarted controller."""
        self.state = ClusterState.RECOVERING
        self._restorer.restore(collected, now)

    def show_running(self) -> None:
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
        """A member has stopped serving: its lease ran out while this controller was away."""
        if record.state is WorkerState.SERVING:
            self.reform(f"the lease of {record.name} ran out", now)

    def run_if_ready(self, now: float) -> None:
        self.generations.run_if_ready(now)

    def above(self, placement: ExpertPlacement) -> ExpertPlacement:
        return self.rebalancing.above(placement)

    @property
    def awaits_experts(self) -> bool:
        return self.recovery.reloads.is_pending

    def ran(self, first_step: int, now: float) -> None:
        self.show_running()
        self.history.runs(self.round.number, first_step, now)
        self._restorer.send_snapshot()
        self.recovery.ran(now)

    @property
    def is_forming(self) -> bool:
        return self.generations.is_forming

    # ---- losses ---------------------------------------------------------------------------

    def form(self, decision: FailureDecision, now: float) -> None:
        self.generations.experts_complete = decision.experts_complete
        self._enter_once(ClusterState.RECOVERING)
        self.generations.begin(decision.members, decision.placement, now)
        self.history.add(self.round.number, now, decision.cause, decision.effect)

    def stall(self, decision: FailureDecision, now: float) -> None:
        self.generations.experts_complete = decision.experts_complete
        self.generations.stall(decision.members, now)
        self.note(decision.cause, decision.effect, now)
        self.settle()
        self._restorer.send_snapshot()

    def settle(self) -> None:
        is_hopeful = self.recovery.replacements.are_coming
        self._enter_once(ClusterState.RECOVERING if is_hopeful else ClusterState.DEGRADED)

    def start_worker(self, member: Member, placement: ExpertPlacement) -> None:
        logger.info("start %s", member.name)
        self.touch()
        self._link.start_worker(member, placement)

    def expert_load(self) -> dict[tuple[str, int], list[float]]:
        sums = self.load.totals()
        keys = set(sums.prefill) & set(sums.decode)
        return {key: sums.counts(key).tolist() for key in keys}

    # ---- ``ControllerHost``, continued: drains and rebalancing --------------------------------

    def send(self, name: str, frame: ControlFrame) -> None:
        self._link.send(name, frame)

    def come_into_force(self, placement: ExpertPlacement) -> None:
        """This placement is in force: a step of the running generation names its epoch."""
        self.placement = placement
        self.recovery.moved(placement)
        self.touch()

    def reform(self, cause: str, now: float) -> None:
        self._enter_once(ClusterState.RECOVERING)
        self.generations.begin(self.round.members, self.placement, now)
        effect = f"go on with {describe_members(self.round.members)}"
        self.history.add(self.round.number, now, cause, effect)

    @property
    def takes_orders(self) -> bool:
        return self.state is not ClusterState.STARTING and self.is_up

    @property
    def is_up(self) -> bool:
        return self.state not in (ClusterState.DRAINING, ClusterState.STOPPED)

    @property
    def runs(self) -> bool:
        return self.round.phase is Phase.RUNNING and self.is_up

    def stage_without(self, devices: Collection[int]) -> Stage:
        others = {m.device for m in self.round.generation.experts} - set(devices)
        grows = all(str(r.info.get("device", "cpu")) == "cpu" for r in self.workers.alive())
        return stage_on(others, self.placement, None if grows else self._num_slots)

    def touch(self) -> None:
        self.version += 1

    def note(self, cause: str, effect: str, now: float) -> None:
        self.history.add(self.round.number, now, cause, effect)
        self.touch()

    def hold_back(self, names: Sequence[str], drains: bool) -> None:
        for name in names:
            self.workers[name].drains = drains
        self.touch()

    def leave(self, names: Sequence[str], why: str, now: float) -> None:
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
        self._restorer.send_snapshot()
        self.generations.begin(members, placement, now)
        effect = f"go on with {describe_members(members)}, placement epoch {placement.epoch}"
        self.history.add(self.round.number, now, why, effect)

    def end(self, names: Sequence[str]) -> None:
        for name in names:
            self._link.send(name, Shutdown(reason="drained"))
        self._link.end_workers(names)

    def refill(self, names: Sequence[str]) -> None:
        for name in names:
            member = self.workers[name].member
            self.recovery.replacements.reopen(member.role, member.rank)

    def remember(self) -> None:
        self.touch()
        self._restorer.send_snapshot()

    # ---- small things ---------------------------------------------------------------------

    def _take_load(self, name: str, frame: Heartbeat | StatusReply) -> None:
        if frame.expert_load is not None:
            self.load.take(name, frame.expert_load)

    def _enter_once(self, state: ClusterState) -> None:
        if self.state is not state:
            self._enter(state)

    def _enter(self, state: ClusterState) -> None:
        logger.info("%s -> %s", self.state.value, state.value)
        self.state = next_cluster_state(self.state, state)
        self.touch()
