"""One rebalancing: its stages and its result."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from cluster.controller.cluster import Cluster
from cluster.controller.epoch_change import ChangeState, EpochChange
from cluster.controller.metrics import RebalanceOutcome
from cluster.controller.operations import OperationState
from cluster.controller.planner_thread import PlannerThread
from cluster.controller.rebalance_job import RebalanceQuery, by_load, percent
from cluster.core.frames import ControlFrame, EpochSwitched
from cluster.core.placement import ExpertPlacement
from cluster.planner import mesh
from cluster.planner.stages import Stage, is_reached, next_stage
from cluster.policy.rebalance import RebalanceDecision
from cluster.tracing import names

_SHARES = "shares of a stage"
MAX_STAGES = 64
"""Maximum number of stages of a rebalancing, which then ends with the placement reached so far."""


class RunningRebalance:
    """One rebalancing: decides and carries out its next stage. Owned by ``Rebalancing``."""

    def __init__(
        self,
        decision: RebalanceDecision,
        asked: RebalanceQuery,
        cluster: Cluster,
        plans: PlannerThread,
        now: float,
    ) -> None:
        self.decision = decision
        self.asked = asked
        self.began_at = now
        """Monotonic time at which the rebalancing began, in seconds."""
        self.change: EpochChange | None = None
        """The placement change of the running stage; None while no stage runs."""
        self.num_stages = 0
        """Number of stages whose placement came into force."""
        self.num_moved = 0
        """Number of expert slots filled by stages whose placement came into force."""
        self.num_bytes = 0
        """Bytes of expert weights moved, including those of a failed stage."""
        self.report: dict[str, Any] | None = None
        """Result of the rebalancing, for the field ``last`` in the status; None while it runs."""
        self.ended_at = 0.0
        """Monotonic time at which the rebalancing ended, in seconds; 0 while it runs."""
        self.is_proved = True
        """False from the end of an applied rebalancing until its effect is measured; else True."""
        self._cluster = cluster
        self._plans = plans
        self._opened = cluster.begin_trace(names.REBALANCE)

    @property
    def is_over(self) -> bool:
        """Whether the rebalancing was applied, failed or was cancelled."""
        return self.report is not None

    @property
    def loading(self) -> list[dict[str, str]]:
        """The running transfers of experts, each with keys ``worker`` and ``from`` (its source)."""
        return self.change.loading if self.change is not None else []

    @property
    def phase(self) -> str:
        """Current phase of the rebalancing, as a text for users."""
        change = self.change
        if change is None:
            return "plan"
        loads = f" ({change.num_loaded} of {len(change.stage.fills)})"
        is_loading = change.state is ChangeState.LOAD
        return f"stage {self.num_stages + 1}: {change.state.value}{loads if is_loading else ''}"

    def frame(self, name: str, frame: ControlFrame, now: float) -> None:
        """Handle a worker's frame about the running stage; the next stage may begin."""
        if (change := self.change) is None:
            return
        change.frame(name, frame, now)
        if isinstance(frame, EpochSwitched) and change.state is ChangeState.DONE:
            self._cluster.metrics.switched(frame.stall_s)
        self._advance(now)

    def tick(self, now: float) -> None:
        """Abandon the rebalancing if a drain or scaling runs; otherwise advance its stage."""
        running = self._cluster.operations.running
        if running is not None and running.kind in ("drain", "scale"):
            reason = f"{running.id} takes precedence"
            if self.abandon("failed", reason, now):
                return
        if self.change is not None:
            self.change.tick(now)
        self._advance(now)

    def abandon(self, outcome: RebalanceOutcome, reason: str, now: float) -> bool:
        """End the rebalancing before its running stage takes effect.

        Returns False if it is too late for that. ``reason`` is a text for users.
        """
        is_planning = self._plans.drop(_SHARES)
        if is_planning or (self.change is not None and self.change.cancel(reason)):
            self._end(outcome, reason, now)
            return True
        return False

    def _advance(self, now: float) -> None:
        """Begin the next stage of the rebalancing once the running stage has finished."""
        change = self.change
        if change is None or not change.is_over:
            if self.asked.operation is not None:
                self.asked.operation.phase = self.phase
            return
        self._stage_over()
        if change.state is ChangeState.FAILED:
            self._end("failed", change.reason, now)
        else:
            self.begin_stage(now)

    def begin_stage(self, now: float) -> None:
        """Begin the next stage, or end the rebalancing if no stage is left."""
        cluster, target = self._cluster, self.decision.target
        devices = frozenset(m.device for m in cluster.generation.experts)
        groups = self._plans.topology(cluster.placement).groups
        stage = next_stage(cluster.placement, target, cluster.num_slots, devices, groups)
        if stage is None and self.num_stages == 0 and is_reached(cluster.placement, target):
            shared = cluster.placement.with_shares(target)  # shares and decode devices only
            self._start_stage(Stage(fills=(), placement=shared), now)
        elif stage is None or self.num_stages >= MAX_STAGES:
            self._finish(now)
        else:
            topology = self._plans.topology(stage.placement)
            work = partial(mesh.resolved, self.asked.load.profile, topology, stage.placement)
            self._plans.plan(_SHARES, work, partial(self._stage_shared, stage), now)

    def _stage_shared(
        self, stage: Stage, plan: Future[ExpertPlacement], error: str, now: float
    ) -> None:
        if error:
            self._end("failed", f"no shares can be planned: {error}", now)
        else:
            self._start_stage(replace(stage, placement=plan.result()), now)

    def _start_stage(self, stage: Stage, now: float) -> None:
        section = self._cluster.config.rebalance
        self.change = EpochChange(
            self._cluster, stage, now, limit_s=section.limit_s, bytes_per_s=section.bytes_per_s
        )
        self._advance(now)

    def _finish(self, now: float) -> None:
        if self.num_stages:
            summary = self._summary(now)
            text = f"{summary}, {by_load(self.asked.load.profile)}"
            self._end("applied", text, now)
        else:
            self._end("failed", "no slot is free", now)

    def _end(self, outcome: RebalanceOutcome, text: str, now: float) -> None:
        if self.change is not None:
            self._stage_over()
        self.ended_at, self.is_proved = now, outcome != "applied"
        self._cluster.metrics.decided(outcome)
        self._cluster.moved("rebalance", self.num_moved, self.num_bytes, now - self.began_at)
        self.report = self._report(outcome, text, self._cluster.placement.epoch, now)
        error = "failed" if outcome == "failed" else ""
        found = self._attributes(self.report)
        self._cluster.end_trace(self._opened, self.report["seconds"], found, error)
        effect = text if outcome == "applied" else f"{outcome}: {text}; the epoch in force stays"
        operation = self.asked.operation
        order = "" if operation is None else f" ({operation.id})"
        self._cluster.note(f"rebalance{order}", effect, now)
        if operation is not None:
            states = {"applied": OperationState.SUCCEEDED, "cancelled": OperationState.CANCELLED}
            state = states.get(outcome, OperationState.FAILED)
            self._cluster.operations.end(operation, state, text, now)

    def _stage_over(self) -> None:
        """Add up the results of the stage that has ended."""
        assert self.change is not None, "a stage was under way"
        self.num_bytes += self.change.num_bytes
        if self.change.state is ChangeState.DONE:
            self.num_stages += 1
            self.num_moved += len(self.change.stage.fills)
        self.change = None

    def _summary(self, now: float) -> str:
        """Describe the results of all stages, for messages."""
        decision = self.decision
        is_whole = is_reached(self._cluster.placement, decision.target)
        whole = "" if is_whole else ", as far as the slots allow"
        if self.num_moved > decision.num_moves:  # stages may use a slot before its last expert
            whole += f", {self.num_moved - decision.num_moves} of them on the way"
        return (
            f"filled {self.num_moved} slots in {self.num_stages} epochs ({self.num_bytes} bytes, "
            f"{now - self.began_at:.1f} s){whole}; balancedness "
            f"{percent(decision.balancedness_now)} before, {percent(decision.balancedness_then)} "
            "predicted after it"
        )

    def _report(self, outcome: str, text: str, epoch: int, now: float) -> dict[str, Any]:
        """Return the result of the rebalancing: the field ``last`` of rebalancing in the status."""
        return {
            "outcome": outcome,
            "text": text,
            "epoch": epoch,
            "slots_moved": self.num_moved,
            "bytes": self.num_bytes,
            "seconds": round(now - self.began_at, 3),
            "balancedness": {
                "before": self.decision.balancedness_now,
                "predicted": self.decision.balancedness_then,
                "achieved": None,
            },
        }

    def _attributes(self, report: Mapping[str, Any]) -> dict[str, Any]:
        """Return attributes for the trace of the rebalancing; ``report`` is from ``_report``."""
        return {
            names.OUTCOME: report["outcome"],
            names.PLACEMENT_EPOCH: report["epoch"],
            names.SLOTS: self.num_moved,
            names.BYTES: self.num_bytes,
            names.BALANCEDNESS_BEFORE: self.decision.balancedness_now,
            names.BALANCEDNESS_PREDICTED: self.decision.balancedness_then,
        }
