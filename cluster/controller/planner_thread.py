"""Computes plans of rebalancing in a separate thread.

The controller's loop must answer heartbeats within milliseconds; planning a large model takes
longer. Therefore plans are computed from immutable values, and a plan is stale once the placement
or the generation has changed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from cluster.controller.cluster import Cluster
from cluster.core.errors import ConfigError
from cluster.core.placement import ExpertPlacement
from cluster.load.tracker import Source
from cluster.planner.base import PlannedTopology, planned_topology
from cluster.policy.rebalance import CurrentLoad
from cluster.sizing.devices import expert_step_cost
from cluster.sizing.gpus import slowest_gpu
from cluster.sizing.replay import ExpertStepCost

logger = logging.getLogger(__name__)

_TOKENS_PER_EXPERT = 4
"""Mean number of tokens per expert that a load window must have for reliable statistics."""

T = TypeVar("T")
CHANGED = "the cluster has changed since the plan began"
"""Error text of a computation whose inputs have changed since it began."""
PlanCallback = Callable[[Future[T], str, float], None]
"""Callback of a computation: gets its finished future, the error (or empty) and the time."""


class PlannerThread:
    """Runs named computations in the planner thread and calls their callbacks at a tick.

    A computation must be a pure function of immutable values. Methods are called on one thread;
    ``now`` is in seconds.
    """

    def __init__(self, cluster: Cluster, executor: Executor) -> None:
        """``executor`` runs the computations; ``cluster`` tells if their inputs have changed."""
        self._cluster = cluster
        self._executor = executor
        self._pending: dict[str, tuple[Future[Any], Callable[[float], None]]] = {}

    def tick(self, now: float) -> None:
        """Call the callbacks of finished computations."""
        for what, (future, then) in list(self._pending.items()):
            if future.done() and what in self._pending:  # an earlier callback may have dropped it
                del self._pending[what]
                then(now)

    def waits(self, what: str) -> bool:
        """Return whether the computation named ``what`` is pending."""
        return what in self._pending

    def drop(self, what: str) -> bool:
        """Drop the computation named ``what``; its callback is not called.

        Returns whether it was pending. A running computation continues, without effect.
        """
        pending = self._pending.pop(what, None)
        if pending is not None:
            pending[0].cancel()
        return pending is not None

    def load_now(self, has_ended: bool) -> CurrentLoad | None:
        """Return the expert load for which to plan; None without load.

        This is the load of the newest load window if it has enough rows, else the exponential
        average of the windows. ``has_ended``: whether a window has just ended; if not, and no
        window has ended yet, all load so far is used.
        """
        tracker, banks = self._cluster.load, self._cluster.placement.banks
        newest = tracker.windows[-1] if tracker.windows else None
        needed = _TOKENS_PER_EXPERT * max((b.num_experts for b in banks), default=0)
        enough = newest is not None and newest.sums.rows * self._cluster.top_k >= needed
        source: Source = "window" if enough else "average"
        if not has_ended and newest is None:
            source = "total"
        model = str(self._cluster.workers.model.get("name"))
        profile = tracker.profile(source, model, self._cluster.top_k)
        if profile is None or len(profile.banks) != len(banks):
            return None
        sums = tracker.sums(source)
        prefill = sum(float(c.sum()) for c in sums.prefill.values())
        decode = sum(float(c.sum()) for c in sums.decode.values())
        total = prefill + decode
        return CurrentLoad(profile=profile, prefill_share=prefill / total if total > 0 else 0.0)

    def plan(self, what: str, work: Callable[[], T], then: PlanCallback[T], now: float) -> None:
        """Run ``work`` under the name ``what``; call ``then`` once the result is ready.

        ``then`` is called at a later tick, or before ``plan`` returns.
        """
        basis, future = self._basis(), self._executor.submit(work)

        def finish(now: float) -> None:
            err = future.exception()
            if err is not None and not isinstance(err, ConfigError):
                logger.error("planning failed", exc_info=err)
            error = (str(err) or type(err).__name__) if err is not None else ""
            is_stale = not self._cluster.runs or self._basis() != basis
            then(future, CHANGED if is_stale else error, now)

        self._pending[what] = future, finish
        self.tick(now)

    def _basis(self) -> tuple[ExpertPlacement, int]:
        return self._cluster.placement, self._cluster.generation.number

    def topology(self, placement: ExpertPlacement) -> PlannedTopology:
        """Return the devices of ``placement`` with the slots that a plan may use.

        Devices of lost workers have no slots. The slots reserved for recovery are left out, unless
        a device already holds more experts.
        """
        cluster = self._cluster
        num_slots = cluster.num_slots - cluster.config.workers.recovery_slots
        return planned_topology(cluster.generation.experts, placement, num_slots)

    def step_cost(self) -> ExpertStepCost:
        """Return the estimated cost of a step on an expert worker, for the slowest GPU in use."""
        infos = [record.info for record in self._cluster.workers]
        sizes = [int(info.get("expert_bytes", 0)) for info in infos]
        gpus = [(i["gpu"], i["gpu_bandwidth_bytes_s"]) for i in infos if "gpu" in i]
        dtype = next((str(info["dtype"]) for info in infos if "dtype" in info), "float32")
        return expert_step_cost(self._cluster.config, max([1, *sizes]), dtype, slowest_gpu(gpus))
