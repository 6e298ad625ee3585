"""Simulated autoscaling on recorded traces: the policy, thresholds and a fixed number of workers.

python -m benchmarks.run --only autoscaling

A queueing model of a cluster (`benchmarks/simulated/cluster_model.py`) replays each trace second by
second. The oracle knows the load in advance, changes pool sizes without cost, and meets the targets
of the policy, averaged over half a minute. Worker-seconds above the oracle are wasted, missing
worker-seconds below it are short.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report.results import table
from benchmarks.simulated.cluster_model import ClusterModel, Policy, Run, WorkerModel
from benchmarks.simulated.request_trace import Arrival, azure_arrivals, mooncake_arrivals
from cluster.config.autoscale import AutoscaleSection, PoolLimits
from cluster.core.topology import Role
from cluster.policy.autoscaling import PoolHistory, PoolSample, decide

SECTION = AutoscaleSection()
"""Default options of autoscaling."""
LIMITS = PoolLimits(min_workers=1, max_workers=16)
"""Limits of each pool."""
QUICK_S = 400.0
_ROLES: tuple[Role, ...] = ("attention", "expert")
_UNLIMITED = 1000
_AVERAGE_S = 30
_DELAY_S = 2
"""Shortest wait of a delayed request."""
_EVERY_S = 15
"""Interval at which a threshold checks the use."""
_THRESHOLDS = ((0.8, 0.5), (0.6, 0.3))
"""Use above which a pool gets a worker, and below which it loses one."""


@dataclass(frozen=True, slots=True)
class Case:
    """A trace, and the speed of the workers that serve it."""

    name: str
    arrivals: Callable[[], list[Arrival]]
    worker: WorkerModel


def with_valley(arrivals: Sequence[Arrival]) -> list[Arrival]:
    """Remove requests from a trace so that a fifth of the rate is left in its middle."""
    draw, end_s = random.Random(0), arrivals[-1].time_s
    return [
        a for a in arrivals if draw.random() < 0.6 + 0.4 * math.cos(2 * math.pi * a.time_s / end_s)
    ]


AZURE = WorkerModel(prompt_tokens_s=4000, kv_tokens=16_000, expert_prompt_tokens_s=10_000)
MOONCAKE = WorkerModel(prompt_tokens_s=20_000, kv_tokens=200_000, expert_prompt_tokens_s=40_000)
CASES = (
    Case("Azure", azure_arrivals, AZURE),
    Case("Azure with a valley", lambda: with_valley(azure_arrivals()), AZURE),
    Case("Mooncake", mooncake_arrivals, MOONCAKE),
)


class Follow:
    """The product's autoscaling policy, called as by the controller."""

    def __init__(self, sizes: Mapping[Role, int], section: AutoscaleSection = SECTION) -> None:
        self._sizes = dict(sizes)
        self._pools = {role: PoolHistory(section, LIMITS) for role in sizes}

    def __call__(self, samples: Mapping[Role, PoolSample] | None) -> Mapping[Role, int] | None:
        if samples is None:
            for history in self._pools.values():
                history.restart()
            return None
        for role, sample in samples.items():
            self._pools[role].add(sample)
            self._sizes[role] = sample.num_workers
        found = decide(self._pools, self._sizes)
        return found.wanted if found.changes is not None else None


class Threshold:
    """Adds a worker above one use and removes one below another, by the current use."""

    def __init__(self, above: float, below: float) -> None:
        self._above, self._below = above, below
        self._now = 0

    def __call__(self, samples: Mapping[Role, PoolSample] | None) -> Mapping[Role, int] | None:
        self._now += 1
        if samples is None or self._now % _EVERY_S:
            return None
        sizes = {role: sample.num_workers for role, sample in samples.items()}
        for role, sample in samples.items():
            use = max(sample.kv_use or 0.0, sample.seat_use or 0.0, sample.slot_time or 0.0)
            step = int(use > self._above or sample.num_waiting > 0) or -int(use < self._below)
            if step and LIMITS.clamp(sizes[role] + step) != sizes[role]:
                return {**sizes, role: sizes[role] + step}
        return None


def keep(samples: Mapping[Role, PoolSample] | None) -> None:
    """Policy that never changes the number of workers."""


def oracle(arrivals: Sequence[Arrival], worker: WorkerModel) -> dict[Role, list[int]]:
    """Number of workers of each pool that meets the targets, for each second."""
    sizes: dict[Role, int] = dict.fromkeys(_ROLES, _UNLIMITED)
    samples = ClusterModel(worker, sizes).replay(arrivals, keep).samples
    return {role: _needed(samples[role]) for role in _ROLES}


def _needed(samples: Sequence[PoolSample]) -> list[int]:
    targets = (SECTION.kv_target, SECTION.kv_target, SECTION.slot_time_target)
    ratios = [
        max(
            (u or 0.0) / t
            for u, t in zip((s.kv_use, s.seat_use, s.slot_time), targets, strict=True)
        )
        for s in samples
    ]
    half = _AVERAGE_S // 2
    parts = (ratios[max(i - half, 0) : i + half] for i in range(len(ratios)))
    return [LIMITS.clamp(math.ceil(_UNLIMITED * sum(part) / len(part))) for part in parts]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Results of one policy on one trace."""

    changes: int
    used: int
    wasted: int
    """Worker-seconds above the oracle."""
    short: int
    """Worker-seconds below the oracle; starting workers count as present."""
    delayed: float
    """Fraction of the requests that waited for ``_DELAY_S`` or more."""
    worst_s: int

    @classmethod
    def of(cls, run: Run, need: Mapping[Role, Sequence[int]]) -> Outcome:
        pairs = [p for role in _ROLES for p in zip(run.paid[role], need[role], strict=True)]
        return cls(
            changes=run.num_changes,
            used=sum(paid for paid, _ in pairs),
            wasted=sum(max(paid - wanted, 0) for paid, wanted in pairs),
            short=sum(max(wanted - paid, 0) for paid, wanted in pairs),
            delayed=sum(wait >= _DELAY_S for wait in run.waits_s) / len(run.waits_s),
            worst_s=max(run.waits_s),
        )


def compare(case: Case, until_s: float = math.inf) -> dict[str, Outcome]:
    """Run all policies on one trace, starting from the same numbers of workers."""
    arrivals = [a for a in case.arrivals() if a.time_s < until_s]
    need = oracle(arrivals, case.worker)
    first = {role: max(need[role][:60]) for role in _ROLES}
    peak = {role: max(need[role]) for role in _ROLES}
    policies: dict[str, tuple[Mapping[Role, int], Policy]] = {
        "expertmesh": (first, Follow(first)),
        **{
            f"threshold {above:.0%}, {below:.0%}": (first, Threshold(above, below))
            for above, below in _THRESHOLDS
        },
        "fixed at the peak": (peak, keep),
    }
    return {
        name: Outcome.of(ClusterModel(case.worker, sizes).replay(arrivals, policy), need)
        for name, (sizes, policy) in policies.items()
    }


def section(quick: bool) -> str:
    """Return the Markdown section."""
    rows = []
    for case in CASES:
        for name, found in compare(case, QUICK_S if quick else math.inf).items():
            numbers = (f"{found.changes}", f"{found.used:,}", f"{found.wasted:,}")
            more = (f"{found.short:,}", f"{found.delayed:.2%}", f"{found.worst_s}")
            rows.append([f"{case.name}, {name}", *numbers, *more])
    head = ["trace, policy", "changes", "used, worker-s", "wasted, worker-s", "short, worker-s"]
    head += ["delayed requests", "longest wait, s"]
    about = " ".join((__doc__ or "").split("\n\n", 2)[2].split())
    words = (
        f"A new worker serves after {AZURE.start_s} s; a removed worker leaves after "
        f"{AZURE.drain_s} s. A threshold policy checks the use of a pool every {_EVERY_S} s: it "
        "adds a worker above the first percentage or if requests wait, and removes one below the "
        "second. *Fixed at the peak* always has the oracle's largest number of workers. *With a "
        "valley*, only a fifth of the requests are left in the middle of the trace. Delayed "
        f"requests waited for {_DELAY_S} s or more."
    )
    return "\n\n".join(["## Autoscaling, simulated", f"{about} {words}", table(head, rows)])
