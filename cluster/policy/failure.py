"""Failure policy: decides which workers are lost. Pure; times are arguments."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from cluster.core.topology import Member


@dataclass(frozen=True, kw_only=True, slots=True)
class Liveness:
    """Last sign of life and progress of one worker. Times are monotonic seconds."""

    name: str
    heard_at: float
    """Time at which the last frame of the worker arrived."""
    progress_at: float = 0.0
    """Time of the worker's last heartbeat with a higher progress counter, or from an idle loop."""
    waiting: bool = False
    """Whether the worker's step loop waits for a peer within a step."""
    running: bool = True
    """Whether the worker is in a running generation, so that its step loop must progress."""
    host: str = ""
    patience_s: float = math.inf
    """Longest silence that is explained by recent gaps between frames of workers on its host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerReport:
    """Report of one worker, ``reporter``, that it lost another, ``suspect``."""

    reporter: str
    suspect: str
    reason: str
    at: float
    """Monotonic time at which the controller received the report."""


def find_silent(
    now: float,
    pulses: Sequence[Liveness],
    own_host: str,
    limit_s: float,
    *,
    is_wary: bool = False,
) -> dict[str, str]:
    """Return workers to declare lost (name -> reason), because they are silent or stalled.

    A worker is lost if its silence exceeds its patience (at most ``limit_s``), or with ``is_wary``
    if its silence exceeds ``limit_s``. If half of the running workers on the controller's host
    (``own_host``), and at least two, are silent for half of their limit, the machine is busy, and
    their limit is ``limit_s``. Without silent workers, a worker is also lost if its loop stalls
    with pending work for ``limit_s``, unless it waits for a peer.
    """
    limits = {p.name: limit_s if is_wary else min(p.patience_s, limit_s) for p in pulses}
    here = [p for p in pulses if p.running and p.host == own_host]
    late = [p.name for p in here if now - p.heard_at > limits[p.name] / 2]
    if len(late) > 1 and 2 * len(late) >= len(here):
        limits |= dict.fromkeys(late, limit_s)
    silent = {
        p.name: f"no sign of life for {now - p.heard_at:.1f} s (limit {limits[p.name]:.3g} s)"
        for p in pulses
        if now - p.heard_at > limits[p.name]
    }
    if silent:
        return silent
    return {
        p.name: f"its loop has stalled for {now - p.progress_at:.1f} s (limit {limit_s:g} s)"
        for p in pulses
        if p.running and not p.waiting and now - p.progress_at > limit_s
    }


def silent_hosts(
    now: float, pulses: Sequence[Liveness], own_host: str, limit_s: float
) -> frozenset[str]:
    """Return the workers of silent hosts if the controller's ``own_host`` may cause the silence.

    It may if a worker on another host exceeds its limit (its patience, or half of ``limit_s`` if
    less), and most other hosts are silent for more than half of the smallest limit exceeded.
    """
    away = [p for p in pulses if p.host not in ("", own_host)]
    over = [limit for p in away if now - p.heard_at > (limit := min(p.patience_s, limit_s / 2))]
    return unheard_hosts(pulses, own_host, now - min(over, default=math.inf) / 2)


def unheard_hosts(pulses: Sequence[Liveness], own_host: str, since: float) -> frozenset[str]:
    """Return the workers of hosts from which no frame has arrived since ``since`` (monotonic).

    The result is empty unless these hosts are the majority of the hosts other than ``own_host``,
    and have at least two workers.
    """
    away = [p for p in pulses if p.host not in ("", own_host)]
    heard: dict[str, float] = {}
    for pulse in away:
        heard[pulse.host] = max(heard.get(pulse.host, -math.inf), pulse.heard_at)
    silent = {host for host, at in heard.items() if at < since}
    names = frozenset(p.name for p in away if p.host in silent)
    return names if len(names) > 1 and 2 * len(silent) > len(heard) else frozenset()


def confirm_losses(
    now: float,
    reports: Sequence[PeerReport],
    members: Mapping[str, Member],
    confirm_s: float,
    *,
    silent: Collection[str] = (),
    joins: Collection[str] = (),
    can_spare: Callable[[Collection[str]], bool] = lambda names: True,
) -> dict[str, str]:
    """Return workers to declare lost now (name -> reason), by the reports of their peers.

    A report takes effect after ``confirm_s``, in which the control connection of a dead suspect
    usually closes. The remaining reports come from bad paths, between two hosts or two workers of
    one host, which only one end may notice. One end is declared lost, together with workers of its
    role and host that reports name for the same path. The choice prefers, in this order, an end
    that is ``silent``; that is on most bad paths; that has yet to join (``joins``); without which
    the other members can run (``can_spare``); that is an expert worker (which holds no requests);
    that most reporters name; that has the highest name.
    """
    if not any(now - r.at >= confirm_s for r in reports):
        return {}
    paths: defaultdict[str, set[frozenset[str]]] = defaultdict(set)
    for report in reports:
        ends = members[report.reporter], members[report.suspect]
        hosts = frozenset(end.node for end in ends)
        path = hosts if len(hosts) > 1 else frozenset(end.name for end in ends)
        for end in ends:
            paths[end.name].add(path)

    def side(name: str) -> list[str]:
        here, role = members[name].node, members[name].role
        shared = {n: any(here in path for path in paths[n] & paths[name]) for n in paths}
        like = [n for n in paths if (members[n].node, members[n].role) == (here, role)]
        return [n for n in like if n == name or shared[n]]

    def weight(name: str) -> tuple[bool, int, bool, bool, bool, int, str]:
        return (
            name in silent,
            len(paths[name]),
            name in joins,
            can_spare(side(name)),
            members[name].role == "expert",
            len({r.reporter for r in reports if r.suspect == name}),
            name,
        )

    found = {}
    for name in side(max(paths, key=weight)):
        own = [r for r in reports if name in (r.reporter, r.suspect)]
        report = max(own, key=lambda r: r.suspect == name)
        what = (
            f"{report.reporter} reports" if report.suspect == name else f"has lost {report.suspect}"
        )
        found[name] = f"{what}: {report.reason}"
    return found
