"""Rebalancing: experts follow the load while the cluster serves, without an effect on requests.

When a window of load has ended, or when a client asks, the policy (``cluster.policy.rebalance``)
decides. A decision is carried out in stages (``cluster.planner.stages``), each a change of the
placement epoch (``EpochChange``) with the best shares and decode devices for its slots. A failed
stage leaves the placement of the stages before it. The first whole window afterwards shows the
achieved effect. Planning runs in the planner thread, and its result is dropped if the cluster has
changed meanwhile. ``Rebalancing`` decides the next step; the controller acts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial
from typing import Any

from cluster.controller.parts.cluster import Cluster
from cluster.controller.parts.epoch_change import ChangeState, EpochChange
from cluster.controller.parts.metrics import RebalanceOutcome
from cluster.controller.parts.operation_start import start_operation
from cluster.controller.parts.operations import Operation, OperationState
from cluster.controller.rebalance.job import (
    Question,
    RebalanceCommand,
    RebalanceJob,
    answer,
    by_load,
    describe,
    percent,
    result_of,
)
from cluster.controller.rebalance.plans import CHANGED, Plans
from cluster.core.errors import ConflictError
from cluster.core.frames import ControlFrame, EpochSwitched
from cluster.core.placement import ExpertPlacement
from cluster.load.tracker import LoadWindow
from cluster.load.view import achieved_loads, balancedness_of
from cluster.planner import mesh
from cluster.planner.stages import Stage, is_reached, next_stage
from cluster.policy.rebalance import (
    CurrentLoad,
    RebalanceDecision,
    decide_placement,
    why_impossible,
)
from cluster.tracing.names import REBALANCE

logger = logging.getLogger(__name__)

_AUTOMATIC = "automatic decision"
_SHARES = "shares of a stage"
MAX_STAGES = 64
"""Stages after which a change ends with what it has achieved."""


class Rebalancing:
    """Changes of the cluster's placement by load, one after the other. Owned by the controller.

    ``now`` is in monotonic seconds.
    """

    def __init__(self, cluster: Cluster, executor: Executor) -> None:
        """``executor`` runs the planning."""
        self._cluster = cluster
        self._section = cluster.config.rebalance
        self.plans = Plans(cluster, executor)
        """Decisions by operation id, and the shares of the stage under way."""
        self._looked: tuple[float, CurrentLoad] | None = (
            None  # rows at the last dry run, and its load
        )
        self._job: RebalanceJob | None = None
        self._problem = ""
        self._last: dict[str, Any] | None = None
        """Report of the last change; its end is ``_rested_at``."""
        self._is_proved = True
        """Its effect is known, or there is none."""
        self._rested_at = cluster.began_at
        self._seen_windows = 0

    @property
    def impossible(self) -> str:
        """Why rebalancing is impossible in this cluster; empty if it is possible."""
        return why_impossible(self._cluster.config, len(self._cluster.places.devices()))

    # ---- orders ---------------------------------------------------------------------------

    def begin(self, command: RebalanceCommand, now: float) -> Operation:
        """Look for a better placement and move to it; a dry run ends after the look.

        Raises ``ConflictError`` if that is impossible now; nothing has changed then.
        """
        return start_operation(command, self, self._cluster, now)

    def target(self, command: RebalanceCommand) -> str:
        """See ``OperationKind``."""
        if self.impossible:
            raise ConflictError(f"rebalancing is not possible: {self.impossible}")
        if not self._cluster.runs:
            raise ConflictError("no generation runs")
        return "experts"

    def prepare(self, command: RebalanceCommand) -> Callable[[Operation, float], None]:
        """See ``OperationKind``."""
        if self._job is not None and not command.dry_run:
            raise ConflictError("the cluster is rebalancing automatically just now")
        load = self._load_for(command)
        if load is None:
            raise ConflictError("no load has been seen yet")
        return partial(self._start, load, command.dry_run)

    def _start(self, load: CurrentLoad, dry_run: bool, operation: Operation, now: float) -> None:
        operation.phase = "plan"
        self._ask(Question(load=load, operation=operation, dry_run=dry_run), now)

    def _load_for(self, command: RebalanceCommand) -> CurrentLoad | None:
        """Load now; that of the last dry run as long as no step has been counted since.

        So a command does what the dry run before it has shown, though a window may have ended.
        """
        rows = self._cluster.load.totals().rows
        if self._looked is not None and self._looked[0] == rows:
            return self._looked[1]
        load = self.plans.load_now(has_ended=False)
        self._looked = (rows, load) if command.dry_run and load is not None else None
        return load

    def cancel(self, operation: Operation, now: float) -> None:
        """Cancel a change. Raises ``ConflictError`` after its end and during its switch."""
        job = self._job
        if self.plans.drop(operation.id):
            self._cluster.metrics.decided("cancelled")
            self._cluster.operations.end(operation, OperationState.CANCELLED, "cancelled", now)
            return
        if job is None or job.asked.operation is not operation:
            raise ConflictError(f"{operation.id} has ended")
        if not self._give_up(job, "cancelled"):
            raise ConflictError(f"{operation.id} is at its switch: try again")
        self._end(job, "cancelled", "cancelled", now)

    # ---- events ---------------------------------------------------------------------------

    def frame(self, name: str, frame: ControlFrame, now: float) -> None:
        """A frame of a worker about the change under way."""
        job = self._job
        if job is None or job.change is None:
            return  # a switch that an earlier controller has ordered shows in heartbeats
        job.change.frame(name, frame, now)
        if isinstance(frame, EpochSwitched) and job.change.state is ChangeState.DONE:
            self._cluster.metrics.switched(frame.stall_s)
        self._advance(job, now)

    def tick(self, now: float) -> None:
        """Time has passed: continue a change, or check whether one pays."""
        self.plans.tick(now)
        if self._job is not None:
            self._watch(self._job, now)
            return
        windows = self._cluster.load
        if windows.num_windows == self._seen_windows:
            return
        self._seen_windows = windows.num_windows
        self._prove(windows.windows[-1], now)
        load, is_busy = self.plans.load_now(has_ended=True), self.plans.waits(_AUTOMATIC)
        if load is None or is_busy or not self._section.enable_eplb or self.impossible:
            return
        if self._cluster.runs and self._cluster.operations.running is None:
            self._ask(Question(load=load), now)

    @property
    def is_idle(self) -> bool:
        """No change is under way."""
        return self._job is None

    def to_dict(self) -> dict[str, Any]:
        """The section of rebalancing in ``status``."""
        job = self._job
        change = job.change if job is not None else None
        return {
            "automatic": self._section.enable_eplb,
            "possible": not self.impossible,
            "reason": self.impossible,
            "problem": self._problem,
            "phase": job.phase if job is not None else "",
            "loading": change.loading if change is not None else [],
            "last": self._last,
        }

    # ---- deciding -------------------------------------------------------------------------

    def _ask(self, asked: Question, now: float) -> None:
        name = asked.operation.id if asked.operation is not None else _AUTOMATIC
        placement, plans = self._cluster.placement, self.plans
        inputs = plans.topology(placement), placement, self._section, plans.step_cost()
        work = partial(decide_placement, asked.load, *inputs)
        plans.plan(name, work, partial(self._decided, asked), now)

    def _decided(
        self, asked: Question, future: Future[RebalanceDecision], error: str, now: float
    ) -> None:
        operation, operations = asked.operation, self._cluster.operations
        problem = f"no placement can be planned: {error}" if error else ""
        if operation is None:
            if self._job is not None or operations.running is not None or error == CHANGED:
                return  # the next window is checked again
            self._problem = problem
            if error:
                logger.warning("no rebalancing: %s", problem)
            else:
                self._follow(future.result(), asked, now)
        elif error:
            operations.end(operation, OperationState.FAILED, problem, now)
        else:
            decision = future.result()
            operation.result = result_of(decision, asked.dry_run)
            if asked.dry_run or not self._follow(decision, asked, now):
                text = answer(decision, asked)
                operations.end(operation, OperationState.SUCCEEDED, text, now)

    # ---- carrying out ---------------------------------------------------------------------

    def _follow(self, decision: RebalanceDecision, asked: Question, now: float) -> bool:
        """Start a change, or count why there is none; an order does not wait for the interval."""
        if decision.action == "none":
            self._cluster.metrics.decided("skipped_gain")
        elif asked.operation is None and now - self._rested_at < self._section.interval_s:
            self._cluster.metrics.decided("skipped_churn")
        else:
            opened = self._cluster.begin_trace(REBALANCE)
            job = RebalanceJob(decision=decision, asked=asked, began_at=now, opened=opened)
            self._job = job
            logger.info("rebalance: %s", describe(decision))
            self._next(job, now)
            return True
        return False

    def _watch(self, job: RebalanceJob, now: float) -> None:
        """Check whether the change is in time, or must be abandoned."""
        running = self._cluster.operations.running
        if running is not None and running.kind in ("drain", "scale"):
            reason = f"{running.id} goes first"
            if self._give_up(job, reason):
                self._end(job, "failed", reason, now)
                return
        if job.change is not None:
            job.change.tick(now)
        self._advance(job, now)

    def _give_up(self, job: RebalanceJob, reason: str) -> bool:
        """False if it is too late."""
        if self.plans.drop(_SHARES):
            return True
        return job.change is not None and job.change.cancel(reason)

    def _advance(self, job: RebalanceJob, now: float) -> None:
        """Begin the next stage after a finished one."""
        change = job.change
        if change is None or not change.is_over:
            if job.asked.operation is not None:
                job.asked.operation.phase = job.phase
            return
        job.stage_over()
        if change.state is ChangeState.FAILED:
            self._end(job, "failed", change.reason, now)
        else:
            self._next(job, now)

    def _next(self, job: RebalanceJob, now: float) -> None:
        """Begin the next stage, or end."""
        cluster, target = self._cluster, job.decision.target
        devices = frozenset(m.device for m in cluster.generation.experts)
        stage = next_stage(cluster.placement, target, cluster.num_slots, devices)
        if stage is None and job.num_stages == 0 and is_reached(cluster.placement, target):
            shared = cluster.placement.with_shares(target)  # shares and decode devices only
            self._begin_stage(job, Stage(fills=(), placement=shared), now)
        elif stage is None or job.num_stages >= MAX_STAGES:
            self._finish(job, now)
        else:
            topology = self.plans.topology(stage.placement)
            work = partial(mesh.resolved, job.asked.load.profile, topology, stage.placement)
            self.plans.plan(_SHARES, work, partial(self._stage_shared, job, stage), now)

    def _stage_shared(
        self, job: RebalanceJob, stage: Stage, plan: Future[ExpertPlacement], error: str, now: float
    ) -> None:
        if error:
            self._end(job, "failed", f"no shares can be planned: {error}", now)
        else:
            self._begin_stage(job, replace(stage, placement=plan.result()), now)

    def _begin_stage(self, job: RebalanceJob, stage: Stage, now: float) -> None:
        limit_s, bytes_per_s = self._section.limit_s, self._section.bytes_per_s
        job.change = EpochChange(
            self._cluster, stage, now, limit_s=limit_s, bytes_per_s=bytes_per_s
        )
        self._advance(job, now)

    def _finish(self, job: RebalanceJob, now: float) -> None:
        if job.num_stages:
            summary = job.summary(self._cluster.placement, now)
            text = f"{summary}, {by_load(job.asked.load.profile)}"
            self._end(job, "applied", text, now)
        else:
            self._end(job, "failed", "no slot is free to begin with", now)

    def _end(self, job: RebalanceJob, outcome: RebalanceOutcome, text: str, now: float) -> None:
        if job.change is not None:
            job.stage_over()
        self._job = None
        self._rested_at, self._is_proved = now, outcome != "applied"
        self._cluster.metrics.decided(outcome)
        self._cluster.moved("rebalance", job.num_moved, job.num_bytes, now - job.began_at)
        self._last = job.report(outcome, text, self._cluster.placement.epoch, now)
        error = "failed" if outcome == "failed" else ""
        found = job.attributes(self._last)
        self._cluster.end_trace(job.opened, self._last["seconds"], found, error)
        effect = text if outcome == "applied" else f"{outcome}: {text}; the epoch in force stays"
        operation = job.asked.operation
        order = "" if operation is None else f" ({operation.id})"
        self._cluster.note(f"rebalance{order}", effect, now)
        if operation is not None:
            states = {"applied": OperationState.SUCCEEDED, "cancelled": OperationState.CANCELLED}
            state = states.get(outcome, OperationState.FAILED)
            self._cluster.operations.end(operation, state, text, now)

    def _prove(self, window: LoadWindow, now: float) -> None:
        """Record the effect of a change, from the first whole window in it."""
        last, placement = self._last, self._cluster.placement
        if self._is_proved or last is None or window.began_at < self._rested_at:
            return
        self._is_proved = True
        if not window.epoch == placement.epoch == last["epoch"]:
            return  # the placement changed again before a window ended
        found = balancedness_of(list(achieved_loads(placement, self._cluster.load).values()))
        last["balancedness"]["achieved"] = found
        before, predicted = (last["balancedness"][name] for name in ("before", "predicted"))
        effect = (
            f"balancedness {percent(found)} in the first window of load of epoch "
            f"{placement.epoch}; {percent(before)} before, {percent(predicted)} predicted"
        )
        self._cluster.note("rebalance measured", effect, now)
