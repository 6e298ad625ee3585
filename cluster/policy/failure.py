"""Failure policy: which workers are lost, and how the others continue. Pure; time passed in."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Member
from cluster.planner.stages import SlotFill
from cluster.policy.coverage import Holdings, cover


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureDecision:
    """What to do after members left or joined; the controller carries it out."""

    can_run: bool
    """A generation of the members runs; else an expert has no copy, or no attention worker is left.
    """
    placement: ExpertPlacement
    """Maps of the new generation; the old ones where none can run."""
    loads: tuple[SlotFill, ...]
    """What members must load before it runs."""
    experts_complete: bool
    """Every expert has a copy on a member, or will have one after ``loads``."""
    effect: str
    """Effect, for people."""


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


def decide_members(
    members: Sequence[Member],
    holdings: Holdings,
    *,
    highest_epoch: int,
    expert_load: Mapping[tuple[str, int], Sequence[float]] | None = None,
) -> FailureDecision:
    """How these ``members``, survivors and newcomers, continue.

    ``highest_epoch`` is the highest placement epoch that any worker ran: new maps are above it.
    ``expert_load`` as for ``cover``.
    """
    current = holdings.current
    epoch = max(highest_epoch, current.epoch)
    devices = {m.device for m in members if m.holds_experts}
    covered = cover(holdings, devices, epoch + 1, expert_load)
    placement, loads = covered.placement, covered.loads
    can_run = placement is not None and any(m.runs_attention for m in members)
    if placement is None:
        placement = current
    elif placement.banks == current.banks:
        placement = replace(placement, epoch=epoch)
    if can_run:
        effect = f"go on with {describe_members(members)}, placement epoch {placement.epoch}"
        effect = f"{_loads_text(loads, members)}; {effect}" if loads else effect
    elif any(m.runs_attention for m in members):
        effect = _missing_text(current, covered.missing)
    else:
        effect = "no attention worker is left"
    return FailureDecision(
        can_run=can_run,
        placement=placement if can_run else current,
        loads=loads if can_run else (),
        experts_complete=covered.placement is not None and (can_run or not loads),
        effect=effect,
    )


def describe_losses(lost: Mapping[str, str]) -> str:
    """``lost expert-0: closed; lost expert-2: no heartbeat``; ``lost`` is worker -> reason."""
    return "; ".join(f"lost {name}: {reason}" for name, reason in sorted(lost.items()))


def describe_members(members: Sequence[Member]) -> str:
    """``1 attention and 2 expert workers``, ``2 colocated workers``."""
    found = Counter(m.role for m in members)
    if found["colocated"]:
        return f"{found['colocated']} colocated worker{'' if found['colocated'] == 1 else 's'}"
    experts = found["expert"]
    return (
        f"{found['attention']} attention and {experts} expert worker{'' if experts == 1 else 's'}"
    )


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


def _missing_text(placement: ExpertPlacement, missing: Sequence[tuple[int, int]]) -> str:
    """``missing`` are (place of the bank, expert)."""
    index, expert = missing[0]
    bank = placement.banks[index]
    verb = "expert has" if len(missing) == 1 else "experts have"
    return (
        f"{len(missing)} {verb} no copy left, the first is expert {expert} "
        f"of bank {bank.bank} layer {bank.layer}"
    )


def _loads_text(loads: Sequence[SlotFill], members: Sequence[Member]) -> str:
    """``expert-0, expert-2 load 64 experts``."""
    devices = {load.device for load in loads}
    names = [m.name for m in members if m.device in devices]
    return f"{', '.join(names)} load{'s' if len(names) == 1 else ''} {len(loads)} experts"
