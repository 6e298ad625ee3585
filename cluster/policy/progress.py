"""Finds the workers for which steps wait while no step commits, to report the cluster not ready.

This takes at most 2 s after the last progress: workers send a heartbeat every 0.5 s, so a stall of
``STALL_S`` is reported after 1.5 s, and a silent worker is late after the same time. No worker is
declared lost here; the limits of failure detection may be much longer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

STALL_S = 0.9
"""Time without progress after which a step counts as stalled. Exchanges and commits are progress,
and so is computation for a time that grows with the rows (``workers.metrics.activity``)."""
STEPS_WAIT = "steps wait for"
"""Text for operators, before the names of workers."""
SILENT_S = 1.5
"""Time without a sign of life after which a worker is late, even if idle: every step needs all
members."""
_FRESH_S = 1.0
"""Maximum age of a heartbeat that shows that a worker advances."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepProgress:
    """The last heartbeat of a member of a running generation."""

    name: str
    heard_at: float
    """Monotonic time of its last sign of life."""
    runs_attention: bool
    stalled_s: float | None
    """See ``Heartbeat``."""
    waits_for: tuple[str, ...] = ()
    """See ``Heartbeat``."""


def find_late(now: float, paces: Sequence[StepProgress]) -> tuple[str, ...]:
    """Return the members for which steps wait; none if a step advances or no step is requested.

    Members silent for ``SILENT_S`` are late. Without any, if a step of an attention worker stalls,
    the late members are those silent for half as long, else those that stall without waiting for a
    peer, else those for which attention workers wait, preferably ones that do not wait themselves.
    """
    if silent := tuple(p.name for p in paces if now - p.heard_at >= SILENT_S):
        return silent
    busy = [(p, p.stalled_s) for p in paces if p.stalled_s is not None]
    stalled = [p for p, stalled_s in busy if stalled_s >= STALL_S]
    if any(s < STALL_S and now - p.heard_at < _FRESH_S for p, s in busy):
        return ()
    if not any(p.runs_attention for p in stalled):
        return ()
    quiet = tuple(p.name for p in paces if now - p.heard_at >= SILENT_S / 2)
    hung = tuple(p.name for p in stalled if not p.waits_for)
    awaited = dict.fromkeys(name for p in stalled if p.runs_attention for name in p.waits_for)
    waiting = {p.name for p in stalled if p.waits_for}
    return quiet or hung or tuple(n for n in awaited if n not in waiting) or tuple(awaited)
