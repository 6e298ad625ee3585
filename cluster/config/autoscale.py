"""Configuration of the autoscaler: pool limits, targets and times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from cluster.config.option_metadata import INTERNAL, flag
from cluster.core.checks import check, check_choice, check_each, is_at_least_1, is_positive
from cluster.core.topology import Role

AutoscaleMode = Literal["off", "dry-run", "on"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolLimits:
    """Smallest and largest number of workers of a pool, both inclusive."""

    min_workers: int
    max_workers: int

    def clamp(self, count: int) -> int:
        """Return the allowed number of workers that is nearest to ``count``."""
        return max(self.min_workers, min(self.max_workers, count))


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoscaleSection:
    """Whether the autoscaler runs, and within which limits."""

    autoscale: AutoscaleMode = "off"
    """Change the pool sizes by load automatically within the limits below; ``dry-run`` only records
    the decisions."""
    min_attention_workers: int | None = None
    """Smallest number of attention workers with ``autoscale``, by default the number at start."""
    max_attention_workers: int | None = None
    """Largest number of attention workers with ``autoscale``, by default the number at start."""
    min_expert_workers: int | None = None
    """Smallest number of expert workers with ``autoscale``, by default the number at start; in
    colocated mode of all workers."""
    max_expert_workers: int | None = None
    """Largest number of expert workers with ``autoscale``, by default the number at start; in
    colocated mode of all workers."""
    queue_target: float = field(default=1.0, metadata=flag("--autoscale-queue-target"))
    """Mean number of waiting sequences per attention worker at which their pool grows
    immediately."""
    kv_target: float = field(default=0.7, metadata=flag("--autoscale-kv-target"))
    """Target mean share of KV blocks, and of ``max_num_seqs``, in use on attention workers."""
    slot_time_target: float = field(default=0.6, metadata=flag("--autoscale-slot-time-target"))
    """Target share of time in which an expert worker computes experts, the mean of all of them."""
    up_s: float = field(default=30.0, metadata=flag("--autoscale-up-s"))
    """Time over which use is averaged. A pool grows if this average is above 1.1 times a target."""
    down_s: float = field(default=180.0, metadata=flag("--autoscale-down-s"))
    """Time for which fewer workers must be sufficient before a pool shrinks."""
    limit_s: float = field(default=300.0, metadata=INTERNAL)
    """Time limit in seconds for new workers to serve; after it the scaling is rolled back."""
    queue_s: float = field(default=5.0, metadata=INTERNAL)
    """Time in seconds over which the number of waiting sequences is averaged."""
    sample_s: float = field(default=1.0, metadata=INTERNAL)
    """Time in seconds between two samples of the workers' stats."""
    retry_s: float = field(default=60.0, metadata=INTERNAL)
    """Pause in seconds after a failed scaling; each further failure doubles the pause."""

    def __post_init__(self) -> None:
        check_choice("autoscale", self.autoscale, AutoscaleMode)
        counts = "min_attention_workers max_attention_workers min_expert_workers max_expert_workers"
        check_each(self, counts, is_at_least_1, "must be at least 1")
        times = "queue_target up_s down_s limit_s queue_s sample_s retry_s"
        check_each(self, times, is_positive, "must be positive", "autoscale_")
        shares, rule = "kv_target slot_time_target", "must be above 0 and at most 1"
        check_each(self, shares, lambda share: 0 < share <= 1, rule, "autoscale_")
        rule = f"must be at least autoscale_up_s ({self.up_s:g})"
        check(self.down_s >= self.up_s, "autoscale_down_s", self.down_s, rule)

    def limits(self, pools: Mapping[Role, int]) -> dict[Role, PoolLimits]:
        """Return the size limits of each pool. ``pools``: number of workers at start, by role."""
        found = {}
        for role, start in pools.items():
            least, most = self._configured_limits(role)
            found[role] = PoolLimits(min_workers=least or start, max_workers=most or start)
        return found

    def check_pools(self, mode: str, pools: Mapping[Role, int]) -> None:
        """Raise ``ConfigError`` if the pools at start contradict the autoscaler's options."""
        if self.autoscale == "off" or mode == "auto":  # checked again once the mode is chosen
            return
        rule = "must be off in local mode: one worker holds everything"
        check(mode != "local", "autoscale", self.autoscale, rule)
        if mode == "colocated":
            rule = "must be left out in colocated mode: the limits of expert workers count all"
            names = "min_attention_workers max_attention_workers"
            check_each(self, names, lambda count: False, rule)
        for role, limits in self.limits(pools).items():
            _check_start("attention" if role == "attention" else "expert", limits, pools[role])
        may_change = any(
            limits.min_workers < limits.max_workers for limits in self.limits(pools).values()
        )
        rule = "needs a limit that differs from the number at start, for example max_expert_workers"
        check(may_change, "autoscale", self.autoscale, rule)

    def _configured_limits(self, role: Role) -> tuple[int | None, int | None]:
        if role == "attention":
            return self.min_attention_workers, self.max_attention_workers
        return self.min_expert_workers, self.max_expert_workers


def _check_start(pool: str, limits: PoolLimits, start: int) -> None:
    started = f"num_{pool}_workers ({start})"
    rule = f"must not exceed {started}"
    check(limits.min_workers <= start, f"min_{pool}_workers", limits.min_workers, rule)
    rule = f"must be at least {started}"
    check(limits.max_workers >= start, f"max_{pool}_workers", limits.max_workers, rule)
