"""Decides which worker serves which expert after members left or joined. Pure.

Weights stay in place if possible. The maps use the desired copies that each device holds; an expert
without a desired copy uses any other copy. An expert that no device holds is loaded by a member
with free slots, chosen so that loads stay even. When all devices of the desired placement are back,
the maps are the desired placement.

Example, one bank of 4 experts, desired ((0, 1), (2, 3), (0, 2)), device 1 is lost:

    plan_coverage -> maps ((0, 1, 3), (-1, -1), (0, 2)), loads (expert 3 into slot 2 of device 0)

When a worker joins that was started with device 1's copies, the maps are the desired ones again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from msgspec import structs

from cluster.core.errors import ConflictError
from cluster.core.placement import FREE_SLOT, BankPlacement, ExpertPlacement
from cluster.core.topology import Member, Role
from cluster.planner.stages import SlotFill, Stage


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertHoldings:
    """The experts in the workers' memory, and their free slots."""

    current: ExpertPlacement
    """Placement in force: survivors hold the experts that it names."""
    desired: ExpertPlacement
    """The placement of the whole cluster."""
    joining: Mapping[int, ExpertPlacement] = field(default_factory=dict)
    """Device -> placement with which its new worker was started; the worker holds its part of
    it."""
    room: int | None = None
    """Number of expert slots of a device in each bank; None if banks can grow."""
    barred: frozenset[int] = frozenset()
    """Devices that reported that they cannot load experts."""
    failed: Collection[SlotFill] = ()
    """Failed loads on which ``current`` relies."""
    expert_load: Mapping[tuple[str, int], Sequence[float]] = field(default_factory=dict)
    """(bank, layer) -> tokens by logical expert; experts of other banks have equal weights."""
    is_local: bool = False
    """Whether the attention worker holds all experts, on device 0 (``--mode local``)."""


Missing = Sequence[tuple[int, int]]
"""(index of the bank, expert) of experts for which there is no free slot."""


def plan_coverage(
    holdings: ExpertHoldings, devices: Collection[int], epoch: int
) -> tuple[Stage | None, Missing]:
    """Return the stage to a placement on ``devices`` (those of the members), and missing experts.

    ``epoch`` is the epoch of the new placement. The stage is None if any expert is missing.
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
    """Return a placement that uses only ``devices``, with the loads that it needs.

    ``room`` as in ``ExpertHoldings``. Raises ``ConflictError`` if the devices have too few slots.
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
    """Return a placement without these devices; rows after the last remaining device are dropped.

    ``room`` as in ``ExpertHoldings``. Raises ``ConflictError`` if the others have too few slots.
    """
    left = set(range(placement.num_devices)) - set(gone)
    return stage_on(left, placement, room).placement.up_to(max(left, default=-1) + 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class FailureDecision:
    """How the cluster continues after members left or joined."""

    stage: Stage | None
    """Maps of the new generation, and the loads that it needs first. None if no generation can run,
    because an expert has no copy or no attention worker is left."""
    experts_complete: bool
    """Whether every expert has a copy on a member, or will have one after the loads."""
    effect: str
    """Effect, for display."""


def decide_members(
    members: Sequence[Member], holdings: ExpertHoldings, highest_epoch: int
) -> FailureDecision:
    """Decide how the cluster continues with these ``members``, survivors and new workers.

    ``highest_epoch`` is the highest placement epoch that any worker ran; new maps have a higher
    one.
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
    """``lost expert-0: closed; lost expert-2: no heartbeat``; ``lost`` is worker -> reason."""
    return "; ".join(f"lost {name}: {reason}" for name, reason in sorted(lost.items()))


def describe_members(members: Sequence[Member]) -> str:
    """Return ``1 attention and 2 expert workers`` or ``2 colocated workers``."""
    return describe_pools(Counter(m.role for m in members))


def describe_pools(pools: Mapping[Role, int]) -> str:
    """``describe_members`` for workers by role."""
    together, experts = pools.get("colocated", 0), pools.get("expert", 0)
    plural = "" if (together or experts) == 1 else "s"
    if together:
        return f"{together} colocated worker{plural}"
    return f"{pools.get('attention', 0)} attention and {experts} expert worker{plural}"


class _Bank:
    """Chooses the used copies of one bank from the held ones."""

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
        self._room = self._desired.num_experts if holdings.room is None else holdings.room
        self._loaders = sorted(present - holdings.barred)
        devices = range(self._desired.num_devices)
        held = [self._held(holdings, device, present) for device in devices]
        wanted = {
            expert
            for device, row in enumerate(held)
            for expert in row
            if expert in self._desired.physical_to_logical[device]
        }
        self._rows = [self._used(device, row, wanted) for device, row in enumerate(held)]

    def _held(self, holdings: ExpertHoldings, device: int, present: frozenset[int]) -> list[int]:
        rows = (holdings.joining.get(device) or holdings.current).banks[self._index]
        if device >= rows.num_devices:  # scaling has added it
            return [FREE_SLOT] * len(self._desired.physical_to_logical[device])
        row = list(rows.physical_to_logical[device])
        if device not in present:
            return [FREE_SLOT] * len(row)
        for load in holdings.failed:
            if (load.device, load.bank) == (device, self._index) and load.slot < len(row):
                row[load.slot] = FREE_SLOT
        return row

    def _used(self, device: int, row: list[int], wanted: set[int]) -> list[int]:
        """Return the row without superfluous copies, as short as possible."""
        desired = self._desired.physical_to_logical[device]
        used = [e if e in desired or e not in wanted else FREE_SLOT for e in row]
        while len(used) > len(desired) and used[-1] == FREE_SLOT:
            used.pop()
        return used

    def without_copy(self) -> list[int]:
        """Experts of which no device holds a copy."""
        found = {expert for row in self._rows for expert in row}
        return [e for e in range(self._desired.num_experts) if e not in found]

    def fill(self) -> list[SlotFill]:
        """Assign experts without a copy to devices with free slots, the heaviest first to the least
        loaded.

        Source: longest processing time first (Graham 1969).
        """
        copies = Counter(expert for row in self._rows for expert in row)
        burden = [
            sum(self._weights[e] / copies[e] for e in row if e != FREE_SLOT) for row in self._rows
        ]
        loads = []
        for expert in sorted(self.without_copy(), key=lambda e: (-self._weights[e], e)):
            places = ((burden[d], d, self._free_slot(d)) for d in self._loaders)
            room = [(work, device, slot) for work, device, slot in places if slot is not None]
            if not room:
                break
            _, device, slot = min(room)
            row = self._rows[device]
            row += [FREE_SLOT] * (slot + 1 - len(row))
            row[slot] = expert
            burden[device] += self._weights[expert]
            loads.append(SlotFill(bank=self._index, device=device, slot=slot, expert=expert))
        return loads

    def _free_slot(self, device: int) -> int | None:
        row = self._rows[device]
        if FREE_SLOT in row:
            return row.index(FREE_SLOT)
        return len(row) if len(row) < self._room else None

    def placement(self) -> BankPlacement:
        """Return the maps, with the desired shares and decode devices if possible."""
        if tuple(map(tuple, self._rows)) == self._current.physical_to_logical:
            return self._current
        holders: list[list[int]] = [[] for _ in range(self._desired.num_experts)]
        for device, row in enumerate(self._rows):
            for expert in row:
                if expert != FREE_SLOT:
                    holders[expert].append(device)
        decode: list[int] = []
        for expert, devices in enumerate(holders):
            decode.append(self._decode_device(devices, expert, decode))
        return self._desired.with_slots(self._rows, decode)

    def _decode_device(self, places: Sequence[int], expert: int, others: Sequence[int]) -> int:
        """Return the desired or the current decode device if it has a copy, else the least used."""
        for device in (self._desired.decode_device[expert], self._current.decode_device[expert]):
            if device in places:
                return device
        return min(places, key=lambda d: (others.count(d), d))


def _missing_text(placement: ExpertPlacement, missing: Missing) -> str:
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
