"""Rebalancing: experts follow the load while the cluster serves, and no request notices.

When a window of load has ended, or when somebody asks, the policy (``rebalance``) is heard. What it
decides is done in stages (``planner.stages``), each a change of the placement epoch
(``epoch_change``), and each with the shares and decode homes that are best for its slots. A stage
that fails leaves the placement as the stages before it made it. What came true is looked up in the
first whole window afterwards. ``Rebalancing`` decides what comes next; the controller acts.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from cluster.config import ClusterConfig, RebalanceSection
from cluster.control_frames import (
    ControlFrame,
    EpochReady,
    EpochSwitched,
    ExpertsLoaded,
)
from cluster.epoch_change import ChangeLimits, ChangeState, EpochChange
from cluster.errors import ConfigError, ConflictError, RequestError
from cluster.load_profile import LoadProfile
from cluster.load_tracker import LoadTracker, LoadWindow, Source
from cluster.load_view import achieved_loads, balancedness_of
from cluster.operations import Operation, Operations, OperationState
from cluster.placement import ExpertPlacement
from cluster.planner.base import PlannedTopology
from cluster.planner.stages import Stage, is_reached, next_stage
from cluster.rebalance import (
    LoadNow,
    RebalanceDecision,
    RebalanceSettings,
    decide,
    planned_topology,
    resolved,
    why_impossible,
    with_shares,
)
from cluster.simulate import StepCost
from cluster.topology import Generation
from cluster.worker_table import WorkerTable

logger = logging.getLogger(__name__)

MAX_STAGES = 64
"""Stages after which a change is called done as far as it got."""
_SLOT_TOKENS = {"cpu": 16.0, "cuda": 285.0}
"""What reading an expert's weights takes, in tokens that could be computed meanwhile."""
_TOKENS_PER_EXPERT = 4
"""Tokens of a window, for each expert of a bank, below which it says too little."""
_DECODE_ROWS = 16
_FIRST_ORDER = 1 << 52
"""Load orders of changes are numbered from here on, apart from those of recoveries, and anew for
each controller."""


_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Limits of the buckets of a change's duration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RebalanceOrder:
    """Somebody asks for it."""

    dry_run: bool = False
    """Only say what would be done."""
    request_id: str = ""
    """Begins one operation, however often it is given."""
    expected_epoch: int | None = None
    """Placement epoch that must be in force."""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RebalanceOrder:
        """From plain data. Raises ``RequestError`` for what is no order."""
        if set(data) - {f.name for f in fields(cls)}:
            raise RequestError(f"not a rebalance order: {sorted(data)}")
        return cls(**data)


class RebalanceHost(Protocol):
    """What rebalancing needs of the controller."""

    workers: WorkerTable
    placement: ExpertPlacement
    load: LoadTracker

    @property
    def generation(self) -> Generation:
        """The newest generation."""

    @property
    def runs(self) -> bool:
        """The newest generation runs, and every expert has a copy."""

    def send(self, name: str, frame: ControlFrame) -> None:
        """Send to a worker."""

    def come_into_force(self, placement: ExpertPlacement) -> None:
        """This placement is in force."""

    def reform(self, cause: str, now: float) -> None:
        """Have all members form a new generation."""

    def note(self, cause: str, effect: str, now: float) -> None:
        """Add to the history."""


@dataclass(kw_only=True, slots=True)
class _Job:
    """A decision that is being carried out."""

    decision: RebalanceDecision
    profile: LoadProfile
    began_at: float
    operation: Operation | None
    change: EpochChange | None = None
    num_stages: int = 0
    num_moved: int = 0
    num_bytes: int = 0


@dataclass(kw_only=True, slots=True)
class _Unproven:
    """A change that is done, and what it should have brought."""

    epoch: int
    since: float
    predicted: float | None


class Rebalancing:
    """The changes of a cluster's placement by load, one after the other. Owned by the controller.

    ``now`` is in monotonic seconds.
    """

    def __init__(
        self,
        host: RebalanceHost,
        operations: Operations,
        config: ClusterConfig | None,
        *,
        num_slots: int,
        top_k: int,
        now: float,
    ) -> None:
        """``num_slots`` is the capacity of each expert worker. None as ``config``: it is off."""
        self._host = host
        self._operations = operations
        self._config = config
        self._section = config.rebalance if config is not None else RebalanceSection()
        self._num_slots = num_slots
        self._top_k = max(top_k, 1)
        self.impossible = "there is no configuration" if config is None else why_impossible(config)
        """Why it can never be; empty where it can."""
        self.profile: LoadProfile | None = None
        """Load that the placement in force was made for; None: it is still the first one."""
        self._numbers = itertools.count(_FIRST_ORDER + (operations.term << 32))
        self._highest_epoch = 0
        self._job: _Job | None = None
        self._unproven: _Unproven | None = None
        self._last: dict[str, Any] | None = None
        self._seen_windows = 0
        self._rested_at = now
        self._outcomes = dict.fromkeys(
            ("applied", "skipped_gain", "skipped_churn", "failed", "cancelled"), 0
        )
        self._num_bytes = 0
        self._num_moved = 0
        self._seconds = 0.0
        self._num_changes = 0
        self._buckets = dict.fromkeys(_SECONDS, 0)

    # ---- orders ---------------------------------------------------------------------------

    def begin(self, order: RebalanceOrder, now: float) -> Operation:
        """Look for a better placement and go there; a dry run ends at once.

        Raises ``ConflictError`` where that is not possible now; nothing was changed then.
        """
        before = self._operations.asked_before(order.request_id)
        if before is not None:
            return before
        epoch = self._host.placement.epoch
        if order.expected_epoch not in (None, epoch):
            raise ConflictError(f"epoch {epoch} is in force, not {order.expected_epoch}")
        if self.impossible:
            raise ConflictError(f"rebalancing is not possible: {self.impossible}")
        if not self._host.runs:
            raise ConflictError("no generation runs")
        self._operations.check_free()
        if self._job is not None and not order.dry_run:
            raise ConflictError("the cluster is rebalancing by itself just now")
        load = self._load_now(None)
        if load is None:
            raise ConflictError("no load has been seen yet")
        decision = self._decide(load)
        operation = self._operations.begin("rebalance", "experts", now, order.request_id)
        operation.result = self._result(decision, order.dry_run)
        if order.dry_run or decision.action == "none":
            verb = "would be done" if order.dry_run else "is done"
            text = _describe(decision) if decision.action != "none" else f"nothing {verb}"
            self._operations.end(
                operation, OperationState.SUCCEEDED, f"{text}: {decision.reason}", now
            )
        else:
            self._start(decision, load.profile, operation, now)
        return operation

    def cancel(self, operation: Operation, now: float) -> None:
        """Give a change up. Raises ``ConflictError`` when it has ended, or is at its switch."""
        job = self._job
        if job is None or job.operation is not operation:
            raise ConflictError(f"{operation.id} has ended")
        if job.change is None or not job.change.cancel("cancelled"):
            raise ConflictError(f"{operation.id} is at its switch: try again")
        self._end(job, "cancelled", "cancelled", now)

    # ---- events ---------------------------------------------------------------------------

    def frame(self, name: str, frame: ControlFrame, now: float) -> None:
        """A worker's word on a change that is under way."""
        job = self._job
        if job is None or job.change is None:
            if isinstance(frame, EpochSwitched):
                self._unknown_epoch(frame, now)
            return
        match frame:
            case ExpertsLoaded():
                job.change.loaded(name, frame, now)
            case EpochReady():
                job.change.ready(name, frame)
            case EpochSwitched():
                job.change.switched(frame)
        self._advance(job, now)

    def tick(self, now: float) -> None:
        """Time has passed: go on with a change, or look whether one pays."""
        job = self._job
        if job is not None:
            self._watch(job, now)
            return
        windows = self._host.load
        if windows.num_windows == self._seen_windows:
            return
        self._seen_windows = windows.num_windows
        window = windows.windows[-1]
        self._prove(window, now)
        load = self._load_now(window)
        if load is not None and self._section.enable_eplb and not self.impossible:
            self._consider(load, now)

    def above(self, placement: ExpertPlacement) -> ExpertPlacement:
        """The placement of a new generation: of an epoch above any that a worker was told of."""
        if self._highest_epoch <= self._host.placement.epoch:
            return placement
        return replace(placement, epoch=max(self._highest_epoch + 1, placement.epoch))

    @property
    def is_idle(self) -> bool:
        """No change of ours is under way."""
        return self._job is None

    def begin_change(self, stage: Stage, limits: ChangeLimits, now: float) -> EpochChange:
        """A change of the placement, of an epoch and with order numbers that nobody had before."""
        epoch = max(self._host.placement.epoch, self._highest_epoch) + 1
        self._highest_epoch = epoch
        stage = replace(stage, placement=replace(stage.placement, epoch=epoch))
        return EpochChange(self._host, stage, self._numbers, limits, now)

    # ---- questions ------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """What ``status`` tells."""
        job = self._job
        return {
            "automatic": self._section.enable_eplb,
            "possible": not self.impossible,
            "reason": self.impossible,
            "phase": self._phase(job) if job is not None else "",
            "loading": job.change.loading if job is not None and job.change is not None else [],
            "last": self._last,
            "counts": {
                "outcomes": dict(self._outcomes),
                "bytes": self._num_bytes,
                "slots_moved": self._num_moved,
                "seconds": {
                    "buckets": [list(entry) for entry in self._buckets.items()],
                    "sum": self._seconds,
                    "count": self._num_changes,
                },
            },
        }

    # ---- deciding -------------------------------------------------------------------------

    def _consider(self, load: LoadNow, now: float) -> None:
        """A window has ended: change the placement if that pays."""
        if not self._host.runs or self._operations.running is not None:
            return
        try:
            decision = self._decide(load)
        except ConflictError as err:
            logger.warning("no rebalancing: %s", err)
            return
        if decision.action == "none":
            self._count("skipped_gain")
        elif now - self._rested_at < self._section.interval_s:
            self._count("skipped_churn")
        else:
            self._start(decision, load.profile, None, now)

    def _decide(self, load: LoadNow) -> RebalanceDecision:
        """Raises ``ConflictError`` where devices and load do not fit together."""
        host, section = self._host, self._section
        settings = RebalanceSettings(
            horizon_s=section.horizon_s,
            max_move_fraction=section.max_move_fraction,
            bytes_per_s=section.bytes_per_s,
            step=self._step_cost(),
        )
        try:
            return decide(load, self._topology(host.placement), host.placement, settings)
        except ConfigError as err:
            raise ConflictError(f"no placement can be planned: {err}") from err

    def _topology(self, placement: ExpertPlacement) -> PlannedTopology:
        """The devices that live; on the way they may hold more than is planned for them."""
        spare = self._config.workers.recovery_slots if self._config is not None else 0
        return planned_topology(self._host.generation.experts, placement, self._num_slots - spare)

    def _load_now(self, window: LoadWindow | None) -> LoadNow | None:
        """The newest window where it says enough, else the average; None without load."""
        tracker = self._host.load
        newest = tracker.windows[-1] if tracker.windows else None
        experts = max((b.num_experts for b in self._host.placement.banks), default=0)
        enough = newest is not None and newest.sums.rows * self._top_k >= (
            _TOKENS_PER_EXPERT * experts
        )
        source: Source = "window" if enough else "average"
        if window is None and newest is None:
            source = "total"
        profile = tracker.profile(source, self._model_name(), self._top_k)
        if profile is None or len(profile.banks) != len(self._host.placement.banks):
            return None
        sums = tracker.sums(source)
        prefill = sum(float(c.sum()) for c in sums.prefill.values())
        decode = sum(float(c.sum()) for c in sums.decode.values())
        return LoadNow(
            profile=profile,
            prefill_share=prefill / (prefill + decode) if prefill + decode > 0 else 0.0,
        )

    def _step_cost(self) -> StepCost:
        """Only ratios count: a slot in tokens, and the rows of a step."""
        sizes = [int(r.info.get("expert_bytes", 0)) for r in self._host.workers]
        slot_us, token_us = _SLOT_TOKENS["cpu"], 1.0
        if self._config is not None:
            workers = self._config.workers
            slot_us = _SLOT_TOKENS["cuda" if workers.device == "cuda" else "cpu"]
            if workers.paced_slot_us or workers.paced_token_us:
                slot_us, token_us = workers.paced_slot_us, workers.paced_token_us
        return StepCost(
            slot_s=slot_us / 1e6,
            token_s=token_us / 1e6,
            expert_bytes=max([1, *sizes]),
            decode_tokens=_DECODE_ROWS,
        )

    def _model_name(self) -> str:
        return str(self._host.workers.model.get("name"))

    # ---- carrying out ---------------------------------------------------------------------

    def _start(
        self,
        decision: RebalanceDecision,
        profile: LoadProfile,
        operation: Operation | None,
        now: float,
    ) -> None:
        self._job = _Job(decision=decision, profile=profile, began_at=now, operation=operation)
        logger.info("rebalance: %s", _describe(decision))
        self._next(self._job, now)

    def _watch(self, job: _Job, now: float) -> None:
        """Look whether the change is in time, or must give way."""
        running = self._operations.running
        if job.change is not None:
            if running is not None and running is not job.operation:
                job.change.cancel(f"{running.id} goes first")
            job.change.tick(now)
        self._advance(job, now)

    def _advance(self, job: _Job, now: float) -> None:
        """The next stage where one is done."""
        change = job.change
        if change is None or not change.is_over:
            if job.operation is not None:
                job.operation.phase = self._phase(job)
            return
        job.num_bytes += change.num_bytes
        job.change = None
        if change.state is ChangeState.FAILED:
            self._end(job, "failed", change.reason, now)
            return
        job.num_stages += 1
        job.num_moved += len(change.stage.fills)
        self._next(job, now)

    def _next(self, job: _Job, now: float) -> None:
        """Begin the next stage, or end."""
        host, target = self._host, job.decision.target
        devices = frozenset(m.device for m in host.generation.experts)
        stage = next_stage(host.placement, target, self._num_slots, devices)
        if stage is None and job.num_stages == 0 and is_reached(host.placement, target):
            shared = with_shares(host.placement, target)  # nothing moves: shares and homes only
            stage = Stage(fills=(), placement=shared)
        elif stage is not None:
            try:
                topology = self._topology(stage.placement)
                shared = resolved(job.profile, topology, stage.placement)
            except ConfigError as err:
                self._end(job, "failed", f"no shares can be planned: {err}", now)
                return
            stage = replace(stage, placement=shared)
        if stage is None or job.num_stages >= MAX_STAGES:
            self._finish(job, now)
            return
        limits = ChangeLimits(limit_s=self._section.limit_s, bytes_per_s=self._section.bytes_per_s)
        job.change = self.begin_change(stage, limits, now)
        self._advance(job, now)

    def _finish(self, job: _Job, now: float) -> None:
        placement, decision = self._host.placement, job.decision
        self._unproven = _Unproven(
            epoch=placement.epoch, since=now, predicted=decision.balancedness_then
        )
        whole = "" if is_reached(placement, decision.target) else ", as far as the slots allow"
        self.profile = job.profile
        if not job.num_stages:
            self._end(job, "failed", "no slot is free to begin with", now)
            return
        before, predicted = decision.balancedness_now, decision.balancedness_then
        text = (
            f"filled {job.num_moved} slots in {job.num_stages} epochs ({job.num_bytes} bytes, "
            f"{now - job.began_at:.1f} s){whole}; "
            f"balancedness {_percent(before)}, predicted {_percent(predicted)}"
        )
        self._end(job, "applied", text, now)

    def _end(self, job: _Job, outcome: str, text: str, now: float) -> None:
        self._job = None
        self._rested_at = now
        self._count(outcome)
        self._num_bytes += job.num_bytes
        self._num_moved += job.num_moved
        self._seconds += now - job.began_at
        self._num_changes += 1
        for limit in self._buckets:
            self._buckets[limit] += now - job.began_at <= limit
        self._last = {
            "outcome": outcome,
            "text": text,
            "epoch": self._host.placement.epoch,
            "slots_moved": job.num_moved,
            "bytes": job.num_bytes,
            "seconds": round(now - job.began_at, 3),
            "balancedness": {
                "before": job.decision.balancedness_now,
                "predicted": job.decision.balancedness_then,
                "achieved": None,
            },
        }
        effect = text if outcome == "applied" else f"{outcome}: {text}; the epoch in force stays"
        self._host.note("rebalance", effect, now)
        if job.operation is not None:
            states = {"applied": OperationState.SUCCEEDED, "cancelled": OperationState.CANCELLED}
            state = states.get(outcome, OperationState.FAILED)
            self._operations.end(job.operation, state, text, now)

    def _prove(self, window: LoadWindow, now: float) -> None:
        """What a change has brought, by the first window that ran in it from end to end."""
        unproven = self._unproven
        if unproven is None or window.began_at < unproven.since:
            return
        self._unproven = None
        if window.epoch != unproven.epoch or self._host.placement.epoch != unproven.epoch:
            return  # it was changed again before anything could be seen
        loads = achieved_loads(self._host.placement, self._host.load)
        achieved = balancedness_of(list(loads.values()))
        if self._last is not None:
            self._last["balancedness"]["achieved"] = achieved
        text = f"balancedness {_percent(achieved)}, predicted {_percent(unproven.predicted)}"
        self._host.note(f"epoch {unproven.epoch} had a window of load", text, now)

    def _unknown_epoch(self, frame: EpochSwitched, now: float) -> None:
        """A switch that an earlier controller had ordered: go on with the maps known here.

        Their weights are still in place, since only a later change would overwrite them.
        """
        host = self._host
        is_newer = frame.epoch > host.placement.epoch
        if host.runs and is_newer and frame.generation == host.generation.number:
            self._highest_epoch = frame.epoch
            host.reform(f"a step ran in epoch {frame.epoch}, which nobody here ordered", now)

    # ---- small things ---------------------------------------------------------------------

    def _count(self, outcome: str) -> None:
        self._outcomes[outcome] += 1

    def _phase(self, job: _Job) -> str:
        if job.change is None:
            return "plan"
        done, of = job.change.num_loaded, len(job.change.stage.fills)
        loads = f" ({done} of {of})" if job.change.state is ChangeState.LOAD else ""
        return f"stage {job.num_stages + 1}: {job.change.state.value}{loads}"

    def _result(self, decision: RebalanceDecision, dry_run: bool) -> dict[str, Any]:
        """Fields of ``RebalanceResult`` in ``admin.proto``."""
        return {
            "dry_run": dry_run,
            "action": decision.action,
            "slots_to_move": decision.num_moves,
            "bytes_to_move": decision.num_bytes,
            "balancedness_now": decision.balancedness_now or 0.0,
            "balancedness_predicted": decision.balancedness_then or 0.0,
            "step_time_ratio": decision.time_ratio,
            "gain_s": decision.gain_s,
            "cost_s": decision.cost_s,
        }


def _describe(decision: RebalanceDecision) -> str:
    moves = f"{decision.num_moves} slots ({decision.num_bytes} bytes)"
    what = moves if decision.action == "move" else "shares and decode homes only"
    return (
        f"{what}, balancedness {_percent(decision.balancedness_now)} to "
        f"{_percent(decision.balancedness_then)}"
    )


def _percent(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.1f}%"
