"""Finds the workers for which steps wait while no step commits, to report the cluster not ready.

A stall is found at most 2 s after the last progress: workers send a heartbeat every 0.5 s, so a
stall of ``STALL_S`` is reported after 1.5 s, and a silent worker is late after 1.5 s, too. This
module declares no worker lost; the limits of failure detection may be much longer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

STALL_S = 0.9
"""Seconds without progress after which a step counts as stalled. Exchanges and commits are
progress, and so is computation for a time that grows with the number of rows."""
STEPS_WAIT = "steps wait for"
"""Words of the status that precede the names of the workers for which steps wait."""
SILENT_S = 1.5
"""Seconds without a sign of life after which a worker is late, even if it is idle, because every
step needs all members."""
_FRESH_S = 1.0
"""Maximum age, in seconds, of a heartbeat that shows that the worker's step advances."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepProgress:
    """Progress of a member of the running generation, from its last heartbeat."""

    name: str
    heard_at: float
    """Monotonic time of the member's last sign of life."""
    runs_attention: bool
    stalled_s: float | None
    """Seconds for which a requested or running step has not advanced; None without such a step."""
    waits_for: tuple[str, ...] = ()
    """Names of the workers for which the member's step waits."""
    group: str = ""
    """Step group of an attention worker; empty if there is one, and for expert workers."""


def find_late(now: float, paces: Sequence[StepProgress]) -> tuple[str, ...]:
    """Return the members for which steps wait; none if a step of each step group advances or no
    step is requested.

    Members that are silent for ``SILENT_S`` are late. If none is, but a step of an attention worker
    stalls, the late members are the ones silent for half of ``SILENT_S``; without any, the ones
    that stall and wait for no peer; without any, the ones at the ends of the chains of waits that
    begin at attention workers, or if these wait for each other, the ones for which they wait.
    """
    if silent := tuple(p.name for p in paces if now - p.heard_at >= SILENT_S):
        return silent
    busy = [(p, p.stalled_s) for p in paces if p.stalled_s is not None]
    stalled = [p for p, stalled_s in busy if stalled_s >= STALL_S]
    advancing = [p for p, s in busy if s < STALL_S and now - p.heard_at < _FRESH_S]
    stuck = {p.group for p in stalled if p.runs_attention} - {p.group for p in advancing}
    if not stuck:
        return ()
    stalled = [p for p in stalled if p.group in stuck or not p.runs_attention]
    quiet = tuple(p.name for p in paces if now - p.heard_at >= SILENT_S / 2)
    hung = tuple(p.name for p in stalled if not p.waits_for)
    awaited = dict.fromkeys(name for p in stalled if p.runs_attention for name in p.waits_for)
    waiting = {p.name for p in stalled if p.waits_for}
    ends = _ends_of_chains(awaited, {p.name: p.waits_for for p in paces})
    late = quiet or hung or ends or tuple(n for n in awaited if n not in waiting) or tuple(awaited)
    others = {p.name for p in advancing}  # they serve another step group
    return tuple(name for name in late if name not in others)


def _ends_of_chains(
    names: Iterable[str], waits_for: Mapping[str, Sequence[str]]
) -> tuple[str, ...]:
    """Return the members at the ends of the chains of waits that begin with ``names``.

    An idle worker that sends headers on waits for its parent, and is not itself late.
    """
    found: dict[str, None] = {}
    seen: set[str] = set()
    left = list(names)
    while left:
        name = left.pop(0)
        if name in seen:
            continue
        seen.add(name)
        if further := waits_for.get(name):
            left += further
        else:
            found[name] = None
    return tuple(found)
