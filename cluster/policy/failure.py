"""Failure policy: which workers are lost. Pure; time passed in."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulse:
    """The last sign of life of one worker. Times are monotonic seconds."""

    name: str
    heard_at: float
    """Last frame from it."""
    progress_at: float
    """Last heartbeat in which its progress counter had grown or it was idle."""
    waiting: bool
    """Its loop waits for a peer within a step."""
    running: bool
    """It takes part in a running generation, so that its loop must progress."""
    host: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerReport:
    """A report of one worker that it lost another. ``at`` is in monotonic seconds."""

    reporter: str
    suspect: str
    reason: str
    at: float
    """Time at which the controller received it."""


def find_silent(now: float, pulses: Sequence[Pulse], limit_s: float) -> dict[str, str]:
    """Workers to declare lost (name -> reason).

    A worker without heartbeat is lost. A loop that stalls with work in hand is lost too,
    unless it waits for a peer, or some worker is without heartbeat: a worker that waits for a lost
    peer stalls through no fault of its own.
    """
    silent = {
        p.name: f"no heartbeat for {now - p.heard_at:.1f} s (limit {limit_s:g} s)"
        for p in pulses
        if now - p.heard_at > limit_s
    }
    if silent:
        return silent
    return {
        p.name: f"its loop has stalled for {now - p.progress_at:.1f} s (limit {limit_s:g} s)"
        for p in pulses
        if p.running and not p.waiting and now - p.progress_at > limit_s
    }


def silent_hosts(
    now: float, pulses: Sequence[Pulse], own_host: str, limit_s: float
) -> frozenset[str]:
    """Workers whose silence may be that of the controller's own host, ``own_host``.

    Most of the other hosts are silent at once, with two workers or more: none of a host's workers
    was heard for half of ``limit_s``.
    """
    heard: dict[str, float] = {}
    for pulse in pulses:
        if pulse.host not in ("", own_host):
            heard[pulse.host] = max(heard.get(pulse.host, 0.0), pulse.heard_at)
    silent = {host for host, at in heard.items() if now - at > limit_s / 2}
    names = frozenset(p.name for p in pulses if p.host in silent)
    return names if len(names) > 1 and 2 * len(silent) > len(heard) else frozenset()


def confirm_suspect(
    now: float, reports: Sequence[PeerReport], roles: Mapping[str, str], confirm_s: float
) -> PeerReport | None:
    """The report whose suspect must be declared lost now, if any.

    A report takes effect after ``confirm_s``; by then a dead suspect has usually shown another sign
    (its control connection closes). Both ends of one bad edge may name each other: the worker that
    most others name is lost, then an expert worker (it holds no request), then the highest name.
    """
    if not any(now - r.at >= confirm_s for r in reports):
        return None
    named: defaultdict[str, list[PeerReport]] = defaultdict(list)
    for report in reports:
        named[report.suspect].append(report)

    def weight(suspect: str) -> tuple[int, bool, str]:
        reporters = {r.reporter for r in named[suspect]}
        return len(reporters), roles.get(suspect) == "expert", suspect

    return named[max(named, key=weight)][0]
