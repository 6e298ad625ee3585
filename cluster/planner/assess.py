"""Predicts balance and moves of a given placement, independently of the planner that made it.

Also makes the contiguous placement, which ignores the load: experts in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.core.checks import check
from cluster.core.group_placement import is_apart
from cluster.core.load_profile import BankLoad, LoadProfile
from cluster.core.placement import FREE_SLOT, BankPlacement, ExpertPlacement, contiguous
from cluster.planner import cost
from cluster.planner.base import (
    Floats,
    Ints,
    Move,
    Plan,
    PlannedTopology,
    equally_large,
    normalised,
    slot_arrays,
)
from cluster.planner.moves import find_moves

PREDICTED_ROWS = (16, 64, 256)
"""Numbers of rows of the decode steps for which a plan predicts activated slots."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacedGroup:
    """Banks of a placement with equal numbers of experts, with their load.

    The shapes of the arrays are described in ``planner.base``.
    """

    loads: tuple[BankLoad, ...]
    banks: tuple[BankPlacement, ...]
    load: Floats
    """Loads of the experts, [num_banks, num_experts], divided by the sum of their bank."""
    slots: Ints
    primary: Ints
    slot_loads: Floats
    """Load of each slot according to the placement's split weights, as a share of the bank's."""
    speeds: Floats
    """Relative speeds of the devices in computing prompts, [num_devices], with sum 1."""
    decode_speeds: Floats
    """The same in decode steps, which differ if step groups have devices of their own."""


def placed_groups(
    profile: LoadProfile, topology: PlannedTopology, placement: ExpertPlacement, name: str
) -> Iterator[PlacedGroup]:
    """Yield the banks of a placement in groups with equal numbers of experts.

    Raises ``ConfigError``, with the placement's ``name``, if placement, load and devices do not
    match, or without any bank.
    """
    check(bool(profile.banks), "load_profile.banks", "none", "must name at least one bank")
    placed = banks_of(profile, placement, name)
    for loads in equally_large(profile):
        experts = len(loads[0].counts)
        banks = tuple(placed[b.bank, b.layer] for b in loads)
        slots, primary = slot_arrays(banks, topology.capacities(experts))
        load = normalised([b.counts for b in loads])
        is_whole = not all(map(is_apart, banks))  # as after the loss of a device
        yield PlacedGroup(
            loads=loads,
            banks=banks,
            load=load,
            slots=slots,
            primary=primary,
            slot_loads=_slot_loads(banks, slots, load),
            speeds=topology.speeds(experts, "" if is_whole else "prefill"),
            decode_speeds=topology.speeds(experts, "" if is_whole else "decode"),
        )


def assess(
    profile: LoadProfile,
    topology: PlannedTopology,
    placement: ExpertPlacement,
    current: ExpertPlacement | None = None,
) -> Plan:
    """Evaluate a placement: return a plan of it, with balancedness and the moves from ``current``.

    Raises ``ConfigError`` if placement, load and devices do not match, or without any bank.
    """
    groups = list(placed_groups(profile, topology, placement, "placement"))
    balance: dict[tuple[str, int], float] = {}
    peaks = dict.fromkeys(PREDICTED_ROWS, 0.0)
    for group in groups:
        found = cost.balancedness(group.slot_loads, group.speeds).tolist()
        balance |= {(b.bank, b.layer): value for b, value in zip(group.loads, found, strict=True)}
        for rows in PREDICTED_ROWS:
            over = cost.slots_over_floor(
                group.load, group.primary, group.decode_speeds, profile.top_k, rows
            )
            peaks[rows] += over * len(group.loads) / len(profile.banks)
    moves: list[Move] = []
    if current is not None:
        before = placed_groups(profile, topology, current, "current placement")
        for old, new in zip(before, groups, strict=True):
            moves += find_moves(new.loads, old.slots, new.slots, topology.nearness)
    return Plan(
        placement=placement,
        moves=tuple(moves),
        balancedness=tuple(balance[b.bank, b.layer] for b in profile.banks),
        decode_slots_over_floor=peaks,
    )


def contiguous_plan(
    profile: LoadProfile, topology: PlannedTopology, current: ExpertPlacement | None = None
) -> Plan:
    """Return a plan for an unknown load: experts in order, an equal block on each device.

    ``profile`` names the banks and is used to evaluate the plan. Raises ``ConfigError`` if a device
    sets its own number of slots.
    """
    own = [d.num_expert_slots for d in topology.devices if d.num_expert_slots is not None]
    check(not own, "num_expert_slots", own, "must not be given for a contiguous plan")
    epoch = 1 if current is None else current.epoch + 1
    placement = contiguous(profile.bank_shapes, topology.num_devices, topology.num_redundant, epoch)
    return assess(profile, topology, placement, current)


def banks_of(
    profile: LoadProfile, placement: ExpertPlacement, name: str
) -> dict[tuple[str, int], BankPlacement]:
    """Return the banks of a placement by (bank, layer).

    Raises ``ConfigError``, with the placement's ``name``, unless they are the banks of ``profile``.
    """
    banks: Mapping[tuple[str, int], BankPlacement] = {(b.bank, b.layer): b for b in placement.banks}
    for load in profile.banks:
        bank = banks.get((load.bank, load.layer))
        where = f"{name} of bank {load.bank} layer {load.layer}"
        check(bank is not None, where, "none", "must be there, as the profile has that bank")
        same = bank is not None and bank.num_experts == len(load.counts)
        rule = f"must have the {len(load.counts)} experts of the profile"
        check(same, where, bank.num_experts if bank else None, rule)
    unknown = sorted(set(banks) - {(b.bank, b.layer) for b in profile.banks})
    check(not unknown, name, unknown[:1], "has a bank that the load profile does not know")
    return dict(banks)


def _slot_loads(banks: Sequence[BankPlacement], slots: Ints, loads: Floats) -> Floats:
    """Return the load of each slot according to the split weights of the banks."""
    width = slots.shape[2]
    shares = np.zeros(slots.shape)
    for b, bank in enumerate(banks):
        for d, split in enumerate(bank.split):
            held = split[:width]
            shares[b, d, : len(held)] = held
    load = np.take_along_axis(loads, np.maximum(slots, 0).reshape(len(slots), -1), axis=1)
    return np.where(slots == FREE_SLOT, 0.0, shares * load.reshape(slots.shape))
