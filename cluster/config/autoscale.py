"""The configuration's section for pools that follow the load: limits, targets and times."""

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
    """How many workers a pool may have, both inclusive."""

    least: int
    most: int

    def clamp(self, count: int) -> int:
        """The nearest allowed number."""
        return max(self.least, min(self.most, count))


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoscaleSection:
    """Whether the pools follow the load, and within what limits."""

    autoscale: AutoscaleMode = "off"
    """Scale the pools by load without an order, within the limits below; ``dry-run`` only records
    what it would do."""
    min_attention_workers: int | None = None
    """Least attention workers that ``autoscale`` leaves, by default those of the start."""
    max_attention_workers: int | None = None
    """Most attention workers that ``autoscale`` starts, by default those of the start."""
    min_expert_workers: int | None = None
    """Least expert workers that ``autoscale`` leaves, by default those of the start; in colocated
    mode all workers."""
    max_expert_workers: int | None = None
    """Most expert workers that ``autoscale`` starts, by default those of the start; in colocated
    mode all workers."""
    queue_target: float = field(default=1.0, metadata=flag("--autoscale-queue-target"))
    """Sequences that may wait at each attention worker; above, the pool grows at once."""
    kv_target: float = field(default=0.7, metadata=flag("--autoscale-kv-target"))
    """Share of KV blocks, and of ``max_num_seqs``, to be in use at each attention worker."""
    slot_time_target: float = field(default=0.6, metadata=flag("--autoscale-slot-time-target"))
    """Share of the time in which each expert worker is to compute activated expert slots."""
    up_s: float = field(default=30.0, metadata=flag("--autoscale-up-s"))
    """Time over which use is averaged before a pool grows for it."""
    down_s: float = field(default=180.0, metadata=flag("--autoscale-down-s"))
    """Time for which fewer workers must have sufficed before a pool shrinks."""
    limit_s: float = field(default=300.0, metadata=INTERNAL)
    """Limit for new workers to serve, after which a scaling is taken back."""
    queue_s: float = field(default=5.0, metadata=INTERNAL)
    """Time over which the queue is averaged."""
    sample_s: float = field(default=1.0, metadata=INTERNAL)
    """Time between two looks at the workers' numbers."""
    retry_s: float = field(default=60.0, metadata=INTERNAL)
    """Pause after a failed scaling; doubled by each further failure."""

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
        """The limits of each pool; ``pools`` has the numbers of the start."""
        found = {}
        for role, start in pools.items():
            least, most = self._given(role)
            found[role] = PoolLimits(least=least or start, most=most or start)
        return found

    def check_pools(self, mode: str, pools: Mapping[Role, int]) -> None:
        """Raise ``ConfigError`` where the pools of the start do not go with this section."""
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
        may_change = any(limits.least < limits.most for limits in self.limits(pools).values())
        rule = "needs a limit that differs from the number of the start: max_expert_workers, say"
        check(may_change, "autoscale", self.autoscale, rule)

    def _given(self, role: Role) -> tuple[int | None, int | None]:
        if role == "attention":
            return self.min_attention_workers, self.max_attention_workers
        return self.min_expert_workers, self.max_expert_workers


def _check_start(pool: str, limits: PoolLimits, start: int) -> None:
    started = f"num_{pool}_workers ({start})"
    rule = f"must not exceed {started}"
    check(limits.least <= start, f"min_{pool}_workers", limits.least, rule)
    rule = f"must be at least {started}"
    check(limits.most >= start, f"max_{pool}_workers", limits.most, rule)
