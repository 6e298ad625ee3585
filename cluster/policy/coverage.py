"""Decides which worker serves which expert after members left or joined. Pure.

Weights stay in place if possible. The maps use the copies of the desired placement that each device
holds; an expert without such a copy uses any other copy. An expert that no device holds is loaded
by a member with free slots, chosen so that loads stay even. When all devices of the desired
placement are back, the maps are the desired placement.

Example, one bank of 4 experts, desired ((0, 1), (2, 3), (0, 2)), device 1 is lost:

    plan_coverage -> maps ((0, 1, 3), (-1, -1), (0, 2)), loads (expert 3 into slot 2 of device 0)

When a worker joins that was started with device 1's copies, the maps are the desired ones again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from itertools import chain

from msgspec import structs

from cluster.core.errors import ConflictError
from cluster.core.group_placement import prompt_devices
from cluster.core.placement import FREE_SLOT, BankPlacement, ExpertPlacement
from cluster.core.topology import Member, Role
from cluster.planner.stages import SlotFill, Stage

MAX_LISTED = 8
"""Maximum number of workers that a text about a change lists."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertHoldings:
    """The experts that workers hold in memory, and the slots that are free."""

    current: ExpertPlacement
    """Placement in force: workers that were not lost hold the experts that it names for them."""
    desired: ExpertPlacement
    """Desired placement, that of the complete cluster."""
    joining: Mapping[int, ExpertPlacement] = field(default_factory=dict)
    """Device -> placement with which a new worker was started; the worker holds the device's part
    of this placement."""
    room: int | None = None
    """Maximum number of expert slots of a device in each bank; None if devices can add slots."""
    barred: frozenset[int] = frozenset()
    """Devices that reported that they cannot load experts."""
    failed: Collection[SlotFill] = ()
    """Failed loads of experts: ``current`` names these experts, but the slots do not hold them."""
    expert_load: Mapping[tuple[str, int], Sequence[float]] = field(default_factory=dict)
    """(bank, layer) -> tokens by logical expert; experts of other banks have equal weights."""
    is_local: bool = False
    """Whether the attention worker holds all experts, on device 0 (``--mode local``)."""


Missing = Sequence[tuple[int, int]]
"""(index of the bank, expert) of each expert without a copy for which no slot is free."""


def plan_coverage(
    holdings: ExpertHoldings, devices: Collection[int], epoch: int
) -> tuple[Stage | None, Missing]:
    """Return the stage to a placement that uses only ``devices``, and the missing experts.

    A missing expert has no copy on these devices, and no slot is free for it. If any expert is
    missing, the stage is None. ``epoch`` is the epoch of the new placement.
    """
    present = frozenset(devices)
    banks: list[BankPlacement] = []
    loads: list[SlotFill] = []
    missing: list[tuple[int, int]] = []
    for index, desired in enumerate(holdings.desired.banks):
        counts = holdings.expert_load.get((desired.bank, desired.layer), ())
        weights = [1.0 + x for x in counts] or [1.0] * desired.num_experts
        work = _Bank(holdings, index, present, weights)
        loads += work.fill()
        missing += [(index, expert) for expert in work.without_copy()]
        if not missing:
            banks.append(work.placement())
    if missing:
        return None, missing
    placement = ExpertPlacement(epoch=epoch, banks=tuple(banks))
    return Stage(fills=tuple(loads), placement=placement), ()


def stage_on(devices: Collection[int], current: ExpertPlacement, room: int | None) -> Stage:
    """Return a stage from ``current`` to a placement that uses only ``devices``.

    ``room`` is the maximum number of slots of a device in each bank, None for no maximum. Raises
    ``ConflictError`` if the devices have too few slots.
    """
    holdings = ExpertHoldings(current=current, desired=current, room=room)
    stage, missing = plan_coverage(holdings, devices, current.epoch + 1)
    if stage is None:
        lacking = f"{len(missing)} experts that only they hold"
        raise ConflictError(f"the other workers have no free slots for {lacking}")
    fills = (replace(f, sources=current.banks[f.bank].holders(f.expert)) for f in stage.fills)
    return replace(stage, fills=tuple(fills))


def without_devices(
    gone: Collection[int], placement: ExpertPlacement, room: int | None
) -> ExpertPlacement:
    """Return ``placement`` without the devices ``gone``; other devices take over their experts.

    Devices after the last remaining one are cut off. ``room`` is the maximum number of slots of a
    device in each bank, None for no maximum. Raises ``ConflictError`` if slots do not suffice.
    """
    left = set(range(placement.num_devices)) - set(gone)
    return stage_on(left, placement, room).placement.up_to(max(left, default=-1) + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureDecision:
    """Decision how the cluster continues after members were lost or new workers joined."""

    stage: Stage | None
    """Placement of the new generation, and the experts to load first. None if no generation can
    run, because an expert has no copy or no attention worker is left."""
    experts_complete: bool
    """Whether every expert has a copy on a member, or will have one once ``stage`` is loaded."""
    effect: str
    """Description of the decision, as a text for operators."""


def decide_members(
    members: Sequence[Member], holdings: ExpertHoldings, highest_epoch: int
) -> FailureDecision:
    """Decide how the cluster continues with these ``members``, which include new workers.

    ``highest_epoch`` is the highest placement epoch that any worker ran; a changed placement gets a
    higher epoch.
    """
    current, epoch = holdings.current, max(highest_epoch, holdings.current.epoch)
    devices = {m.device for m in members if m.holds_experts}
    if holdings.is_local and members:
        devices = {0}
    stage, missing = plan_coverage(holdings, devices, epoch + 1)
    if not any(m.runs_attention for m in members):
        is_complete = stage is not None and not stage.fills
        why = "no attention worker is left"
        return FailureDecision(stage=None, experts_complete=is_complete, effect=why)
    if stage is None:
        why = _missing_text(current, missing)
        return FailureDecision(stage=None, experts_complete=False, effect=why)
    if stage.placement.banks == current.banks:
        stage = replace(stage, placement=structs.replace(stage.placement, epoch=epoch))
    effect = f"continue with {describe_members(members)}, placement epoch {stage.placement.epoch}"
    effect = f"{_loads_text(stage.fills, members)}; {effect}" if stage.fills else effect
    return FailureDecision(stage=stage, experts_complete=True, effect=effect)


def describe_losses(lost: Mapping[str, str]) -> str:
    """Describe lost workers (name -> reason), as ``lost expert-0: closed; lost expert-2: ...``."""
    return listed([f"lost {name}: {reason}" for name, reason in sorted(lost.items())], "; ")


def listed(texts: Sequence[str], separator: str = ", ") -> str:
    """Join texts; of more than ``MAX_LISTED`` only the first, as ``a, b and 9 more``."""
    rest = len(texts) - MAX_LISTED
    return separator.join(texts[:MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def describe_members(members: Sequence[Member]) -> str:
    """Describe members by role: ``1 attention and 2 expert workers``, ``2 colocated workers``."""
    return describe_pools(Counter(m.role for m in members))


def describe_pools(pools: Mapping[Role, int], num_prefill: int = 0) -> str:
    """Describe pool sizes, as ``1 attention and 2 expert workers`` or ``2 colocated workers``; with
    step groups, as ``1 prefill, 2 decode and 2 expert workers``."""
    together, experts = pools.get("colocated", 0), pools.get("expert", 0)
    plural = "" if (together or experts) == 1 else "s"
    if together:
        return f"{together} colocated worker{plural}"
    attention = pools.get("attention", 0)
    groups = f"{num_prefill} prefill, {attention - num_prefill} decode"
    own = groups if num_prefill else f"{attention} attention"
    return f"{own} and {experts} expert worker{plural}"


class _Bank:
    """Chooses which copies of one bank to use, from the copies that devices hold."""

    def __init__(
        self,
        holdings: ExpertHoldings,
        index: int,
        present: frozenset[int],
        weights: Sequence[float],
    ) -> None:
        self._index = index
        self._desired = holdings.desired.banks[index]
        self._current = holdings.current.banks[index]
        self._weights = weights
        self._prompts = prompt_devices(self._desired)
        self._room = self._desired.num_experts if holdings.room is None else holdings.room
        self._loaders = sorted(present - holdings.barred)
        slots, held = self._desired.physical_to_logical, self._held(holdings, present)
        pairs = [*zip(held, slots, strict=True)]
        wanted = set[int]()  # not needed if devices hold only experts that they shall hold
        if not all(row == want or {FREE_SLOT, *want}.issuperset(row) for row, want in pairs):
            wanted.update(*(set(row).intersection(want) for row, want in pairs))
        self._rows = [row if row == want else _used(row, want, wanted) for row, want in pairs]
        """Experts in the slots of each device; ``fill`` makes lists of rows that it changes."""

    def _held(self, holdings: ExpertHoldings, present: frozenset[int]) -> Sequence[tuple[int, ...]]:
        """Return the experts in the slots of each device of the desired placement."""
        index, desired = self._index, self._desired.physical_to_logical
        rows = [*self._current.physical_to_logical[: len(desired)]]
        rows += [(FREE_SLOT,) * len(row) for row in desired[len(rows) :]]  # scaling adds them
        for device, placement in holdings.joining.items():
            if device < len(desired):
                own = placement.banks[index].physical_to_logical[device : device + 1]
                rows[device] = own[0] if own else (FREE_SLOT,) * len(desired[device])
        for load in holdings.failed:
            if load.bank == index and load.device < len(rows):
                row = rows[load.device]
                if load.slot < len(row):
                    rows[load.device] = (*row[: load.slot], FREE_SLOT, *row[load.slot + 1 :])
        return [row if d in present else (FREE_SLOT,) * len(row) for d, row in enumerate(rows)]

    def without_copy(self) -> list[int]:
        """Return the experts of which no device holds a copy."""
        found = set[int]().union(*self._rows)
        return [e for e in range(self._desired.num_experts) if e not in found]

    def fill(self) -> list[SlotFill]:
        """Assign experts without a copy to free slots; return the loads of these slots.

        The heaviest expert comes first; each goes to the least loaded device with a free slot.

        Source: longest processing time first (Graham 1969).
        """
        if not (lacking := self.without_copy()):
            return []
        parts = [*self._weights, 0.0]  # the last one is that of ``FREE_SLOT``
        for expert, num_copies in Counter(chain.from_iterable(self._rows)).items():
            if num_copies > 1:
                parts[expert] /= num_copies
        able = [d for d in self._loaders if self._free_slot(d) is not None]
        room = [(sum(map(parts.__getitem__, self._rows[d])), d) for d in able]
        heapify(room)
        loads = []
        for expert in sorted(lacking, key=lambda e: (-self._weights[e], e)):
            if not room:
                break
            work, device = heappop(room)
            slot = self._free_slot(device)
            assert slot is not None, "a device in the heap has room"
            row = self._rows[device] = [*self._rows[device]]
            row += [FREE_SLOT] * (slot + 1 - len(row))
            row[slot] = expert
            loads.append(SlotFill(bank=self._index, device=device, slot=slot, expert=expert))
            if self._free_slot(device) is not None:
                heappush(room, (work + self._weights[expert], device))
        return loads

    def _free_slot(self, device: int) -> int | None:
        row = self._rows[device]
        if FREE_SLOT in row:
            return row.index(FREE_SLOT)
        return len(row) if len(row) < self._room else None

    def placement(self) -> BankPlacement:
        """Return the bank's placement: the current one if it has the same slots.

        Another one has the desired shares and decode devices if possible.
        """
        if tuple(map(tuple, self._rows)) == self._current.physical_to_logical:
            return self._current
        held, decode = [*map(set, self._rows)], [*self._desired.decode_device]
        num_served, first = Counter[int](), 0
        moved = [e for e, device in enumerate(decode) if e not in held[device]]
        for expert in moved:
            num_served.update(decode[first:expert])
            decode[expert], first = self._decode_device(held, expert, num_served), expert
        return self._desired.with_slots(self._rows, decode)

    def _decode_device(
        self, held: Sequence[set[int]], expert: int, num_served: Counter[int]
    ) -> int:
        """Return the decode device for an expert that the desired device does not hold.

        The current device comes first, then the device that serves the fewest of the earlier
        experts, by ``num_served``. If the desired device has no prompts, as in a step group with
        devices of its own, others without prompts come before both. ``held``: experts of each
        device.
        """
        current = self._current.decode_device[expert]
        prompts = self._prompts
        has_prompts = self._desired.decode_device[expert] in prompts
        places = (device for device, experts in enumerate(held) if expert in experts)
        return min(
            places, key=lambda d: ((d in prompts) != has_prompts, d != current, num_served[d], d)
        )


def _used(held: Sequence[int], desired: Sequence[int], wanted: set[int]) -> Sequence[int]:
    """Return a device's slots without superfluous copies of experts, as short as possible."""
    used = [e if e in desired or e not in wanted else FREE_SLOT for e in held]
    while len(used) > len(desired) and used[-1] == FREE_SLOT:
        used.pop()
    return used


def _missing_text(placement: ExpertPlacement, missing: Missing) -> str:
    index, expert = missing[0]
    bank = placement.banks[index]
    verb = "expert has" if len(missing) == 1 else "experts have"
    return (
        f"{len(missing)} {verb} no copy left, the first is expert {expert} "
        f"of bank {bank.bank} layer {bank.layer}"
    )


def _loads_text(loads: Sequence[SlotFill], members: Sequence[Member]) -> str:
    """Describe loads of experts, as ``expert-0, expert-2 load 64 experts``."""
    devices = {load.device for load in loads}
    names = [m.name for m in members if m.device in devices]
    return f"{', '.join(names)} load{'s' if len(names) == 1 else ''} {len(loads)} experts"
