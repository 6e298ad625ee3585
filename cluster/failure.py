"""Failure policy: who is lost, and what the survivors do about it. Plain values, time passed in."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from cluster.placement import BankPlacement, ExpertPlacement
from cluster.topology import Generation, Member


class Outcome(Enum):
    """What a loss means for serving."""

    CONTINUE = "continue"
    """The survivors form a new generation and run the failed step again."""
    INCOMPLETE = "incomplete"
    """No generation can run: an expert has no copy, or no attention worker is left."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureDecision:
    """What to do after a loss; the controller carries it out."""

    outcome: Outcome
    """Whether a new generation runs."""
    members: tuple[Member, ...]
    """The survivors."""
    placement: ExpertPlacement
    """Maps of the new generation; the old ones when the outcome is ``INCOMPLETE``."""
    experts_complete: bool
    """Every expert has a copy on a survivor."""
    gone_devices: frozenset[int]
    """Lost devices that ``placement`` still names; empty unless experts are incomplete."""
    cause: str
    """Who was lost and why, for people."""
    effect: str
    """What follows, for people."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulse:
    """What the controller last heard of one worker. Times are monotonic seconds."""

    name: str
    """Worker."""
    heard_at: float
    """Last frame from it."""
    progress_at: float
    """Last heartbeat in which its progress counter had grown, or it was idle."""
    waiting: bool
    """Its loop waits for a peer within a step."""
    running: bool
    """It takes part in a running generation, so that its loop must turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PeerReport:
    """One worker says that it has lost another. ``at`` is in monotonic seconds."""

    reporter: str
    """Who says so."""
    suspect: str
    """Whom it has lost."""
    reason: str
    """In the reporter's words."""
    at: float
    """When the controller heard of it."""


def decide(
    generation: Generation,
    placement: ExpertPlacement,
    lost: Mapping[str, str],
    *,
    highest_epoch: int,
    gone_devices: frozenset[int] = frozenset(),
) -> FailureDecision:
    """What the survivors of ``generation`` do without the ``lost`` workers (name -> reason).

    ``placement`` is that of the running generation, ``highest_epoch`` the highest epoch that any
    worker ran, ``gone_devices`` were lost earlier and left experts without a copy. The maps change
    only when an expert worker is lost.
    """
    survivors = tuple(m for m in generation.members if m.name not in lost)
    devices = gone_devices | {m.device for m in generation.experts if m.name in lost}
    cause = "; ".join(f"lost {name}: {reason}" for name, reason in sorted(lost.items()))
    epoch = max(highest_epoch, placement.epoch)
    kept = placement.without_devices(devices, epoch + 1 if devices else epoch)
    has_attention = any(m.runs_attention for m in survivors)
    can_run = kept is not None and has_attention
    if not has_attention:
        effect = "no attention worker is left"
    elif kept is None:
        effect = missing_experts(placement, devices)
    else:
        effect = f"go on with {describe_members(survivors)}, placement epoch {kept.epoch}"
    return FailureDecision(
        outcome=Outcome.CONTINUE if can_run else Outcome.INCOMPLETE,
        members=survivors,
        placement=kept if kept is not None else placement,
        experts_complete=kept is not None,
        gone_devices=devices if kept is None else frozenset(),
        cause=cause,
        effect=effect,
    )


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
    """Workers to be declared lost (name -> reason).

    A worker without heartbeat is lost. A loop that stands still with work in hand is lost too, but
    only when it waits for nobody and nobody is without heartbeat: who waits for a lost peer stands
    still through no fault of its own.
    """
    silent = {
        p.name: f"no heartbeat for {now - p.heard_at:.1f} s (limit {limit_s:g} s)"
        for p in pulses
        if now - p.heard_at > limit_s
    }
    if silent:
        return silent
    return {
        p.name: f"its loop stands still for {now - p.progress_at:.1f} s (limit {limit_s:g} s)"
        for p in pulses
        if p.running and not p.waiting and now - p.progress_at > limit_s
    }


def confirm_suspect(
    now: float, reports: Sequence[PeerReport], roles: Mapping[str, str], confirm_s: float
) -> PeerReport | None:
    """The report whose suspect is to be declared lost now, if any.

    A report is acted on after ``confirm_s``, in which a dead suspect shows itself otherwise (its
    control connection closes). Both ends of one bad edge may name each other: the one that most
    workers name is lost, then an expert worker (it holds no request), then the highest name.
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


def missing_experts(placement: ExpertPlacement, lost: frozenset[int]) -> str:
    """``5 experts have no copy left, the first is expert 3 of bank mlp layer 0``."""
    missing = [(b, e) for b in placement.banks for e in _without_copy(b, lost)]
    bank, expert = missing[0]
    verb = "expert has" if len(missing) == 1 else "experts have"
    return (
        f"{len(missing)} {verb} no copy left, the first is expert {expert} "
        f"of bank {bank.bank} layer {bank.layer}"
    )


def _without_copy(bank: BankPlacement, lost: frozenset[int]) -> list[int]:
    held = {
        expert
        for device, slots in enumerate(bank.physical_to_logical)
        if device not in lost
        for expert in slots
    }
    return [e for e in range(bank.num_experts) if e not in held]
