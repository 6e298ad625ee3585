"""Rebalancing: moves experts by load while the cluster serves, without interrupting requests.

At the end of a load window or on a client's command, the policy (``cluster.policy.rebalance``)
decides. The decision is carried out in stages (``cluster.planner.stages``), each a change of the
placement epoch (``EpochChange``) with the best shares and decode devices for its slots. If a
stage fails, the placement of the stage before it stays. The next whole window measures the effect.
Planning runs in the planner thread; its result is dropped if the cluster has changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from typing import Any

from cluster.controller.cluster import Cluster
from cluster.controller.operation_start import start_operation
from cluster.controller.operations import Operation, OperationState
from cluster.controller.planner_thread import CHANGED, PlannerThread
from cluster.controller.rebalance_job import (
    RebalanceCommand,
    RebalanceQuery,
    answer,
    describe,
    percent,
    result_of,
)
from cluster.controller.running_rebalance import RunningRebalance
from cluster.core.errors import ConflictError
from cluster.core.frames import ControlFrame
from cluster.load.tracker import LoadWindow
from cluster.load.view import achieved_balancedness
from cluster.policy.rebalance import (
    CurrentLoad,
    RebalanceDecision,
    decide_placement,
    why_impossible,
)

logger = logging.getLogger(__name__)

_AUTOMATIC = "automatic decision"


class Rebalancing:
    """Decides when the load requires another placement, and runs one rebalancing at a time.

    Owned by the controller. ``now`` is in monotonic seconds.
    """

    def __init__(self, cluster: Cluster, executor: Executor) -> None:
        """``executor`` runs the computation of plans."""
        self._cluster = cluster
        self._section = cluster.config.rebalance
        self.plans = PlannerThread(cluster, executor)
        """Pending computations: decisions, by operation id, and split weights of a stage."""
        self._looked: tuple[float, CurrentLoad] | None = None
        """Rows counted before the last dry run, and the load that it used.

        None without a dry run, and after a command without ``dry_run`` that finds more rows.
        """
        self._newest: RunningRebalance | None = None
        self._ended: RunningRebalance | None = None
        """The rebalancing before ``_newest``; None without one."""
        self._problem = ""
        self._seen_windows = 0

    @property
    def _job(self) -> RunningRebalance | None:
        """The running rebalancing; None if none runs."""
        return self._newest if self._newest is not None and not self._newest.is_over else None

    @property
    def _last(self) -> RunningRebalance | None:
        """The last rebalancing that has ended; None before the first."""
        return self._ended if self._job is not None else self._newest

    @property
    def impossible(self) -> str:
        """Reason why this cluster cannot be rebalanced; empty if it can be."""
        return why_impossible(self._cluster.config, len(self._cluster.places.devices()))

    # ---- commands ---------------------------------------------------------------------------

    def begin(self, command: RebalanceCommand, now: float) -> Operation:
        """Begin to plan a better placement and change to it; a dry run ends after the plan.

        Raises ``ConflictError`` if that is impossible now; the cluster is unchanged in that case.
        """
        return start_operation(command, self, self._cluster, now)

    def target(self, command: RebalanceCommand) -> str:
        """Return ``experts``, the target of a rebalance command (``OperationKind.target``).

        Raises ``ConflictError`` if the cluster cannot be rebalanced or no generation runs.
        """
        if self.impossible:
            raise ConflictError(f"rebalancing is not possible: {self.impossible}")
        if not self._cluster.runs:
            raise ConflictError("no generation runs")
        return "experts"

    def prepare(self, command: RebalanceCommand) -> Callable[[Operation, float], None]:
        """Check a rebalance command; return its first step (``OperationKind.prepare``)."""
        if self._job is not None and not command.dry_run:
            raise ConflictError("the cluster is already rebalancing automatically")
        load = self._load_for(command)
        if load is None:
            raise ConflictError("no load has been recorded yet")
        return partial(self._start, load, command.dry_run)

    def _start(self, load: CurrentLoad, dry_run: bool, operation: Operation, now: float) -> None:
        operation.phase = "plan"
        self._ask(RebalanceQuery(load=load, operation=operation, dry_run=dry_run), now)

    def _load_for(self, command: RebalanceCommand) -> CurrentLoad | None:
        """Return the load of the last dry run if no row was counted since, else the newest load.

        Therefore a command after a dry run does what the dry run showed, even if a load window has
        ended. None without load.
        """
        rows = self._cluster.load.totals().rows
        if self._looked is not None and self._looked[0] == rows:
            return self._looked[1]
        load = self.plans.load_now(has_ended=False)
        self._looked = (rows, load) if command.dry_run and load is not None else None
        return load

    def cancel(self, operation: Operation, now: float) -> None:
        """Cancel the rebalancing of ``operation``.

        Raises ``ConflictError`` if it has ended, or while the workers switch epochs.
        """
        job = self._job
        if self.plans.drop(operation.id):
            self._cluster.metrics.decided("cancelled")
            self._cluster.operations.end(operation, OperationState.CANCELLED, "cancelled", now)
            return
        if job is None or job.asked.operation is not operation:
            raise ConflictError(f"{operation.id} has ended")
        if not job.abandon("cancelled", "cancelled", now):
            raise ConflictError(f"{operation.id} is switching epochs: try again")

    # ---- events ---------------------------------------------------------------------------

    def frame(self, name: str, frame: ControlFrame, now: float) -> None:
        """Handle a worker's frame about the placement change of the running rebalancing."""
        if (job := self._job) is not None:
            job.frame(name, frame, now)  # without a job, the frame answers an earlier controller

    def tick(self, now: float) -> None:
        """Advance the running rebalancing; without one, decide at the end of each load window."""
        self.plans.tick(now)
        if self._job is not None:
            self._job.tick(now)
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
            self._ask(RebalanceQuery(load=load), now)

    @property
    def is_idle(self) -> bool:
        """Whether no rebalancing is running."""
        return self._job is None

    def to_dict(self) -> dict[str, Any]:
        """Return the rebalancing section of the cluster's status."""
        job = self._job
        return {
            "automatic": self._section.enable_eplb,
            "possible": not self.impossible,
            "reason": self.impossible,
            "problem": self._problem,
            "phase": job.phase if job is not None else "",
            "loading": job.loading if job is not None else [],
            "last": self._last.report if self._last is not None else None,
        }

    # ---- deciding -------------------------------------------------------------------------

    def _ask(self, asked: RebalanceQuery, now: float) -> None:
        name = asked.operation.id if asked.operation is not None else _AUTOMATIC
        placement, plans = self._cluster.placement, self.plans
        inputs = plans.topology(placement), placement, self._section, plans.step_cost()
        work = partial(decide_placement, asked.load, *inputs)
        plans.plan(name, work, partial(self._decided, asked), now)

    def _decided(
        self, asked: RebalanceQuery, future: Future[RebalanceDecision], error: str, now: float
    ) -> None:
        operation, operations = asked.operation, self._cluster.operations
        problem = f"no placement can be planned: {error}" if error else ""
        if operation is None:
            if self._job is not None or operations.running is not None or error == CHANGED:
                return  # decide again at the next window
            self._problem = problem
            if error:
                self._cluster.metrics.decided("failed")
                logger.warning("could not rebalance: %s", problem)
            else:
                self._follow(future.result(), asked, now)
        elif error:
            if not asked.dry_run:
                self._cluster.metrics.decided("failed")
            operations.end(operation, OperationState.FAILED, problem, now)
        else:
            decision = future.result()
            operation.result = result_of(decision, asked.dry_run)
            if asked.dry_run or not self._follow(decision, asked, now):
                text = answer(decision, asked)
                operations.end(operation, OperationState.SUCCEEDED, text, now)

    # ---- carrying out ---------------------------------------------------------------------

    def _follow(self, decision: RebalanceDecision, asked: RebalanceQuery, now: float) -> bool:
        """Start the rebalancing that was decided, unless there is a reason against it.

        Returns whether it was started; if not, the reason is counted in the metrics. Only an
        automatic decision must wait ``interval_s`` after the last rebalancing.
        """
        rested_at = self._last.ended_at if self._last is not None else self._cluster.began_at
        if decision.action == "none":
            self._cluster.metrics.decided("skipped_gain")
        elif asked.operation is None and now - rested_at < self._section.interval_s:
            self._cluster.metrics.decided("skipped_churn")
        else:
            logger.info("rebalance: %s", describe(decision))
            self._ended = self._newest
            self._newest = RunningRebalance(decision, asked, self._cluster, self.plans, now)
            self._newest.begin_stage(now)
            return True
        return False

    def _prove(self, window: LoadWindow, now: float) -> None:
        """Record the effect of the last rebalancing, from the first whole load window after it."""
        last, placement = self._last, self._cluster.placement
        if last is None or last.report is None or last.is_proved or window.began_at < last.ended_at:
            return
        last.is_proved = True
        if not window.epoch == placement.epoch == last.report["epoch"]:
            return  # the placement changed again before the window ended
        found = achieved_balancedness(placement, self._cluster.load)
        balancedness = last.report["balancedness"]
        balancedness["achieved"] = found
        before, predicted = balancedness["before"], balancedness["predicted"]
        effect = (
            f"balancedness {percent(found)} in the first window of load of epoch "
            f"{placement.epoch}; {percent(before)} before, {percent(predicted)} predicted"
        )
        self._cluster.note("rebalance measured", effect, now)
