"""Autoscaling policy: how many workers each pool should have, and why. Pure: times are passed in.

Each measure of a pool's use is compared with its target, and the largest ratio counts:

    attention worker   share of KV blocks in use, share of max_num_seqs that runs: kv_target
    expert worker      share of time in which it computes activated expert slots: slot_time_target
    colocated worker   all three

Each rule proposes the number of workers after the colon if its condition holds:

    queue   if on average over queue_s at least queue_target sequences wait at each worker, and the
            queue would last longer than up_s:  workers x (running + waiting) / running
    grow    if the ratio averaged over up_s exceeds _TOLERANCE:  workers x ratio
    shrink  if fewer than queue_target / 2 sequences wait at each worker for down_s, and with fewer
            workers the highest demand of that time would give a ratio of at most
            _AFTER_SHRINKING:  that number of workers

A change at most doubles or halves a pool, one pool changes at a time, and each change restarts all
averages. A pool that had to grow again soon after it shrank waits twice as long the next time.

Source: Kubernetes' horizontal pod autoscaler (``workers x metric / target``, a tolerance of 10%,
the highest recommendation of a stabilisation window before shrinking; "Horizontal Pod Autoscaling",
kubernetes.io) and Knative's pod autoscaler (a long window, and a short one that reacts to bursts;
"About autoscaling", knative.dev). Here the queue takes the place of the short window, the next
change waits until the last one has ended, and the time before shrinking adapts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from cluster.config.autoscale import AutoscaleSection, PoolLimits
from cluster.core.topology import Role

_TOLERANCE = 1.1
"""Ratio of a pool's use to its target up to which the pool does not grow."""
_AFTER_SHRINKING = 0.85
"""Highest ratio of use to target that is expected after a pool shrinks."""
_MOST_HOLDS = 8
"""Longest time that a pool waits before it shrinks, in multiples of ``down_s``."""
_SAME = 1e-9


class Urgency(IntEnum):
    """Kinds of change that a pool of workers needs, the most urgent first."""

    LIMITS = 0
    QUEUE = 1
    GROW = 2
    SHRINK = 3
    KEEP = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolSample:
    """Measurements of a pool of workers at one time.

    ``kv_use``, ``seat_use`` and ``slot_time`` are means of the workers.
    """

    at_s: float
    num_workers: int
    kv_use: float | None = None
    """Share of KV blocks in use, 0 to 1; None for expert workers, which have no KV cache."""
    seat_use: float | None = None
    """Running sequences of a worker divided by ``max_num_seqs``; None for expert workers."""
    slot_time: float | None = None
    """Share of time in which a worker computed activated expert slots; None if unknown."""
    num_running: float = 0.0
    """Number of running sequences of all workers together."""
    num_waiting: float = 0.0
    """Number of waiting sequences of all workers together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proposal:
    """The number of workers that one pool needs, with the reason and the urgency."""

    urgency: Urgency
    wanted: int
    """Number of workers that the pool needs, within the limits of the pool."""
    reason: str
    """Reason of the proposal, as a text for operators."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoscaleDecision:
    """Pool sizes that the controller should reach by a scale operation."""

    wanted: Mapping[Role, int]
    """Number of workers of each pool; at most one pool differs from its current size."""
    changes: Role | None
    """The pool to change; None if no pool changes."""
    reason: str
    """Reason of the decision, as a text for operators."""


@dataclass(frozen=True, slots=True)
class _Use:
    """One measure of a pool's use, averaged over ``up_s``, with its target."""

    name: str
    share: float
    target: float

    @property
    def ratio(self) -> float:
        return self.share / self.target

    def __str__(self) -> str:
        return f"{self.name} {self.share:.0%}, target {self.target:.0%}"


class PoolHistory:
    """Measurements of a pool since its size last changed; proposes the number of workers."""

    def __init__(self, section: AutoscaleSection, limits: PoolLimits) -> None:
        self._section = section
        self._limits = limits
        self._samples: deque[PoolSample] = deque()
        self._demands: deque[tuple[float, float]] = deque()
        """(time, number of workers with which the pool's use, averaged over ``up_s``, would meet
        its target)."""
        self._began_at = self._queued_at = math.inf
        self._size = 0
        self._hold_s = section.down_s
        self._shrunk_at: float | None = None
        """Time at which the pool last shrank; None if it has grown since, or never shrank."""

    def restart(self) -> None:
        """Forget all measurements of the pool, which does not serve normally or was resized."""
        self._samples.clear()
        self._demands.clear()

    def add(self, sample: PoolSample) -> None:
        """Add measurements of the pool; a different number of workers restarts all averages."""
        if sample.num_workers != self._size:
            self._resize(sample)
        if not self._samples:
            self._began_at = self._queued_at = sample.at_s
        self._samples.append(sample)
        while self._samples[0].at_s < sample.at_s - self._section.up_s - _SAME:
            self._samples.popleft()
        if self._waiting() >= self._section.queue_target / 2:
            self._queued_at = sample.at_s
        if self._lasts(self._section.up_s):
            demand = max((use.ratio for use in self._uses()), default=math.inf) * self._size
            self._demands.append((sample.at_s, demand))
            while self._demands[0][0] < sample.at_s - self._hold_s - _SAME:
                self._demands.popleft()

    def proposal(self) -> Proposal:
        """Return the number of workers that the pool needs now."""
        if not self._samples:
            return self._keep("no numbers of its workers yet")
        size, limits = self._size, self._limits
        if limits.clamp(size) != size:
            reason = f"{size} workers, allowed are {limits.min_workers} to {limits.max_workers}"
            return Proposal(urgency=Urgency.LIMITS, wanted=limits.clamp(size), reason=reason)
        found = self._by_queue() or self._by_use() or self._by_shrinking()
        if found is None:
            return self._keep(str(next(iter(self._uses()), "no use is reported")))
        if limits.clamp(found.wanted) == size:
            bound = limits.max_workers if found.wanted > size else limits.min_workers
            return self._keep(f"{found.reason}, but {bound} is the limit")
        wanted = limits.clamp(found.wanted)
        return Proposal(urgency=found.urgency, wanted=wanted, reason=found.reason)

    # ---- rules ------------------------------------------------------------------------------

    def _by_queue(self) -> Proposal | None:
        section, size = self._section, self._size
        waiting = self._waiting()
        recent = self._recent(section.queue_s)
        if not self._lasts(section.queue_s) or waiting < section.queue_target:
            return None
        half = len(recent) // 2
        before, after = _mean_waiting(recent[:half]), _mean_waiting(recent[half:])
        rate = (after - before) / (section.queue_s / 2)
        if after + rate * section.up_s < section.queue_target * size / 2:
            return None  # the queue shortens fast enough
        running = max(_mean([s.num_running for s in recent]), 1.0)
        wanted = math.ceil(size * (running + waiting * size) / running)
        reason = f"{waiting:.1f} sequences wait at each worker, above {section.queue_target:g}"
        wanted = min(max(wanted, size + 1), 2 * size)
        return Proposal(urgency=Urgency.QUEUE, wanted=wanted, reason=reason)

    def _by_use(self) -> Proposal | None:
        uses = self._uses()
        if not uses or not self._lasts(self._section.up_s) or uses[0].ratio <= _TOLERANCE:
            return None
        wanted = min(math.ceil(self._size * uses[0].ratio - _SAME), 2 * self._size)
        reason = f"{uses[0]}, over {self._section.up_s:g} s"
        return Proposal(urgency=Urgency.GROW, wanted=wanted, reason=reason)

    def _by_shrinking(self) -> Proposal | None:
        now = self._samples[-1].at_s
        quiet_s = now - max(self._began_at, self._queued_at)
        if not self._demands or quiet_s < self._hold_s - _SAME:
            return None
        peak = max(demand for _, demand in self._demands)
        if not math.isfinite(peak):
            return None
        wanted = max(math.ceil(peak / _AFTER_SHRINKING - _SAME), math.ceil(self._size / 2))
        if wanted >= self._size:
            return None
        reason = f"for {self._hold_s:g} s nothing waited, and {peak:.1f} workers met the target"
        return Proposal(urgency=Urgency.SHRINK, wanted=wanted, reason=reason)

    # ---- numbers ----------------------------------------------------------------------------

    def _resize(self, sample: PoolSample) -> None:
        if self._size and sample.num_workers < self._size:
            self._shrunk_at = sample.at_s
        elif self._shrunk_at is not None:
            least_s = self._section.down_s
            is_regretted = sample.at_s - self._shrunk_at < self._hold_s
            hold_s = self._hold_s * (2 if is_regretted else 0.5)
            self._hold_s = max(least_s, min(hold_s, _MOST_HOLDS * least_s))
            self._shrunk_at = None
        self._size = sample.num_workers
        self.restart()

    def _lasts(self, seconds: float) -> bool:
        """Return whether measurements of the pool have been added for at least ``seconds``."""
        return self._samples[-1].at_s - self._began_at >= seconds - _SAME

    def _recent(self, seconds: float) -> list[PoolSample]:
        since = self._samples[-1].at_s - seconds - _SAME
        return [s for s in self._samples if s.at_s > since]

    def _waiting(self) -> float:
        """Return the number of waiting sequences per worker, averaged over ``queue_s``."""
        return _mean_waiting(self._recent(self._section.queue_s)) / max(self._size, 1)

    def _uses(self) -> list[_Use]:
        """Return the known measures of use, sorted by falling ratio to their targets."""
        section, samples = self._section, self._samples
        found = (
            ("KV use", [s.kv_use for s in samples], section.kv_target),
            ("running sequences", [s.seat_use for s in samples], section.kv_target),
            ("slot time", [s.slot_time for s in samples], section.slot_time_target),
        )
        uses = [
            _Use(name, _mean(known), target)
            for name, values, target in found
            if (known := [v for v in values if v is not None])
        ]
        return sorted(uses, key=lambda use: -use.ratio)

    def _keep(self, reason: str) -> Proposal:
        return Proposal(urgency=Urgency.KEEP, wanted=self._size, reason=reason)


def decide(pools: Mapping[Role, PoolHistory], sizes: Mapping[Role, int]) -> AutoscaleDecision:
    """Decide which pool should change, and to which size: the pool with the most urgent proposal.

    ``pools`` are the measurements and ``sizes`` the current sizes of the pools, by role.
    """
    proposals = {role: history.proposal() for role, history in pools.items()}
    role = min(proposals, key=lambda r: proposals[r].urgency)
    chosen = proposals[role]
    if chosen.urgency is Urgency.KEEP:
        reason = "; ".join(f"{r}: {p.reason}" for r, p in proposals.items())
        return AutoscaleDecision(wanted=dict(sizes), changes=None, reason=reason)
    wanted = {**sizes, role: chosen.wanted}
    return AutoscaleDecision(wanted=wanted, changes=role, reason=f"{role}: {chosen.reason}")


def _mean(values: Iterable[float]) -> float:
    found: Sequence[float] = tuple(values)
    return sum(found) / len(found) if found else 0.0


def _mean_waiting(samples: Sequence[PoolSample]) -> float:
    return _mean([s.num_waiting for s in samples])
