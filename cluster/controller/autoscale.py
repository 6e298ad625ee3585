"""Autoscaling: resizes the pools by load, with the scale operations that clients also use.

``cluster.policy.autoscaling`` decides, from the stats that workers report with their heartbeats.
The averages of the policy restart whenever the cluster is not complete or an operation runs. After
a scale operation that failed or was cancelled, the next one waits; the wait doubles with each
further failure. Failed operations of an earlier controller count too.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.config.autoscale import PoolLimits
from cluster.controller.cluster import Cluster
from cluster.controller.operations import Operation, OperationState
from cluster.controller.scale import Scaling
from cluster.controller.scale_operation import ScaleCommand
from cluster.controller.workers import WorkerRecord
from cluster.core.errors import ConflictError, RequestError
from cluster.core.states import ClusterState, WorkerState
from cluster.core.topology import Role, holds_experts, runs_attention
from cluster.policy.autoscaling import AutoscaleDecision, PoolHistory, PoolSample, decide
from cluster.policy.coverage import describe_pools

logger = logging.getLogger(__name__)

_WAITING = 'num_requests_waiting_by_reason{reason="capacity"}'
_SLOT_SECONDS = "expert_worker_slot_seconds_total"
_MOST_DOUBLINGS = 5


class Autoscaling:
    """Begins scale operations by load; in a dry run, only records them. Owned by the controller.

    ``now`` is in monotonic seconds.
    """

    def __init__(self, cluster: Cluster, scaling: Scaling) -> None:
        self._cluster = cluster
        self._scaling = scaling
        self._section = cluster.config.autoscale
        self._limits = self._section.limits(cluster.config.workers.pools)
        self._pools: dict[Role, PoolHistory] = {}
        self._slot_seconds: dict[str, tuple[float, float]] = {}
        """Worker -> (time of the last sample, seconds in activated slots counted until then)."""
        self._look_at = cluster.began_at
        self._refused_until: dict[tuple[Role, bool], float] = {}
        """(pool, whether it should have grown) -> end of the pause after a refused operation."""
        self._decision: AutoscaleDecision | None = None
        self._noted: Mapping[Role, int] | None = None
        """Pool sizes of the last dry-run entry in the history; None before the first."""
        self._note_at = cluster.began_at
        self._waits_for = ""
        self._refusal = ""
        """Text of the last refused scale operation, with the reason; empty without a refusal."""

    @property
    def is_on(self) -> bool:
        """Whether the autoscaling policy makes decisions, perhaps only in a dry run."""
        return self._section.autoscale != "off"

    def tick(self, now: float) -> None:
        """Sample the stats of the workers and act on a decision. Called on every tick."""
        if not self.is_on or now < self._look_at:
            return
        self._look_at = now + self._section.sample_s
        self._waits_for = self._obstacle()
        if self._waits_for:
            self._restart()
            return
        sizes = self._cluster.places.pools()
        self._take(sizes, now)
        self._decision = decide(self._pools, sizes)
        change = self._change(self._decision, sizes)
        self._waits_for = self._pause(change, now)
        if self._section.autoscale == "dry-run":
            self._note(self._decision, sizes, now)
        elif change is not None and not self._waits_for:
            self._begin(self._decision, change, now)

    def to_dict(self) -> dict[str, Any]:
        """Return the autoscaling section of the cluster's status."""
        decision = self._decision
        limits = self._limits.items() if self.is_on else ()
        return {
            "mode": self._section.autoscale,
            "wanted": dict(decision.wanted) if decision is not None else {},
            "limits": {role: [found.min_workers, found.max_workers] for role, found in limits},
            "reason": decision.reason if decision is not None else "",
            "waits_for": self._waits_for,
        }

    # ---- stats ----------------------------------------------------------------------------

    def _take(self, sizes: Mapping[Role, int], now: float) -> None:
        """Add a sample of the reported stats to the history of each pool."""
        for role, size in sizes.items():
            workers = [
                r
                for r in self._cluster.workers
                if r.member.role == role and r.state is WorkerState.SERVING
            ]
            if role not in self._pools:
                self._pools[role] = PoolHistory(self._section, self._allowed(role))
            if len(workers) == size:
                sample = self._sample(role, workers, now)
                if sample is not None:
                    self._pools[role].add(sample)

    def _sample(self, role: Role, workers: Sequence[WorkerRecord], now: float) -> PoolSample | None:
        """Sample the workers of a pool; None while a worker has not reported."""
        kv_use = seat_use = slot_time = None
        running = waiting = 0.0
        if runs_attention(role):
            if any("num_requests_running" not in r.stats for r in workers):
                return None
            running = sum(r.stats["num_requests_running"] for r in workers)
            waiting = sum(r.stats.get(_WAITING, 0.0) for r in workers)
            uses = [r.stats.get("kv_cache_usage_perc", 0.0) for r in workers]
            kv_use = sum(uses) / len(workers)
            seat_use = running / len(workers) / self._cluster.config.engine.max_num_seqs
        if holds_experts(role):
            slot_time = self._slot_time(workers, now)
        return PoolSample(
            at_s=now,
            num_workers=len(workers),
            kv_use=kv_use,
            seat_use=seat_use,
            slot_time=slot_time,
            num_running=running,
            num_waiting=waiting,
        )

    def _slot_time(self, workers: Sequence[WorkerRecord], now: float) -> float | None:
        """Mean share of time for activated slots since the last sample; None if any is unknown."""
        shares = [self._slot_share(record, now) for record in workers]
        known = [share for share in shares if share is not None]
        return sum(known) / len(known) if len(known) == len(shares) and known else None

    def _slot_share(self, record: WorkerRecord, now: float) -> float | None:
        counter = record.stats.get(_SLOT_SECONDS)
        before = self._slot_seconds.pop(record.name, None)
        if counter is None:
            return None
        self._slot_seconds[record.name] = now, counter
        if before is None or now <= before[0]:
            return None
        return max(counter - before[1], 0.0) / (now - before[0])

    def _allowed(self, role: Role) -> PoolLimits:
        """Size limits of a pool; no pool has more expert workers than a bank has experts."""
        limits = self._limits[role]
        most = min((b.num_experts for b in self._cluster.desired.banks), default=limits.max_workers)
        if not holds_experts(role) or most >= limits.max_workers:
            return limits
        return PoolLimits(min_workers=min(limits.min_workers, most), max_workers=most)

    def _restart(self) -> None:
        for history in self._pools.values():
            history.restart()
        self._slot_seconds.clear()

    # ---- whether to act ---------------------------------------------------------------------

    def _obstacle(self) -> str:
        """Reason why the stats must not be sampled now; empty if they may be sampled."""
        running = self._cluster.operations.running
        if running is not None:
            return f"{running.id} is under way"
        if self._cluster.state is not ClusterState.SERVING or not self._cluster.runs:
            return f"the cluster is {self._cluster.state.value}"
        return ""

    def _change(
        self, decision: AutoscaleDecision, sizes: Mapping[Role, int]
    ) -> tuple[Role, bool] | None:
        """The pool that should change, and whether the pool should grow; None without a change."""
        role = decision.changes
        return None if role is None else (role, decision.wanted[role] > sizes[role])

    def _pause(self, change: tuple[Role, bool] | None, now: float) -> str:
        """Reason why no scale operation may begin yet after a failure; empty if one may begin.

        A refusal of a scale operation delays only the change that was refused."""
        left_s = self._refused_until.get(change, now) - now if change is not None else 0.0
        if left_s > 0:
            return f"{left_s:.0f} s are left after a refusal"
        failed = self._failed()
        if not failed:
            return ""
        pause_s = self._section.retry_s * 2 ** min(len(failed) - 1, _MOST_DOUBLINGS)
        left_s = failed[0].ended + pause_s - self._cluster.operations.time_of_day(now)
        if left_s <= 0:
            return ""
        last = failed[0]
        return f"{left_s:.0f} s are left after {last.id} {last.state.value}: {last.message}"

    def _failed(self) -> list[Operation]:
        """Scale operations that ended after the last successful scale operation, newest first."""
        found: list[Operation] = []
        for operation in reversed(self._cluster.operations.kept):
            if operation.kind == "scale" and operation.state is OperationState.SUCCEEDED:
                break
            if operation.kind == "scale":
                found.append(operation)
        return found

    # ---- acts -------------------------------------------------------------------------------

    def _begin(self, decision: AutoscaleDecision, change: tuple[Role, bool], now: float) -> None:
        wanted = decision.wanted
        expert = wanted.get("expert", wanted.get("colocated"))
        order = ScaleCommand(
            attention=wanted.get("attention"), expert=expert, limit_s=self._section.limit_s
        )
        cause, effect = f"autoscaling: {decision.reason}", f"scale to {describe_pools(wanted)}"
        try:
            operation = self._scaling.begin(order, now)
        except (ConflictError, RequestError) as err:
            self._refused_until[change] = now + self._section.retry_s
            self._waits_for = str(err)
            if self._refusal != f"{effect}: {err}":
                self._refusal = f"{effect}: {err}"
                self._cluster.note(cause, f"could not {self._refusal}", now)
            return
        logger.info("%s: %s: %s", operation.id, effect, decision.reason)
        self._waits_for = f"{operation.id} is under way"
        self._restart()
        self._refusal = ""
        self._cluster.note(cause, f"{effect} ({operation.id})", now)

    def _note(self, decision: AutoscaleDecision, sizes: Mapping[Role, int], now: float) -> None:
        """Record the decision of a dry run if it has changed."""
        if decision.wanted == (self._noted or sizes) or now < self._note_at:
            return
        self._noted = decision.wanted
        self._note_at = now + self._section.up_s
        verb = "keep" if decision.changes is None else "scale to"
        effect = f"would {verb} {describe_pools(decision.wanted)} (dry run)"
        self._cluster.note(f"autoscaling: {decision.reason}", effect, now)
