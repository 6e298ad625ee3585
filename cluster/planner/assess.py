"""Predictions for a given placement, independent of the planner that made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cluster.core.checks import check
from cluster.core.load_profile import LoadProfile
from cluster.core.placement import FREE_SLOT, BankPlacement, ExpertPlacement
from cluster.planner import cost
from cluster.planner.base import (
    Floats,
    Ints,
    Move,
    Plan,
    PlannedTopology,
    normalised,
    slot_arrays,
)
from cluster.planner.moves import find_moves

PREDICTED_ROWS = (16, 64, 256)
"""Rows of the decode steps that a plan makes a prediction for."""


def assess(
    profile: LoadProfile,
    topology: PlannedTopology,
    placement: ExpertPlacement,
    current: ExpertPlacement | None = None,
) -> Plan:
    """A placement as a plan: its balancedness under a load, and the moves from ``current``.

    Raises ``ConfigError`` where placement, load and devices do not fit together.
    """
    after = banks_of(profile, placement, "placement")
    before = None if current is None else banks_of(profile, current, "current placement")
    balance: list[float] = []
    moves: list[Move] = []
    peaks: dict[int, list[float]] = {rows: [] for rows in PREDICTED_ROWS}
    for load in profile.banks:
        experts = len(load.counts)
        bank = after[load.bank, load.layer]
        capacities, speeds = topology.capacities(experts), topology.speeds(experts)
        slots, home = slot_arrays([bank], capacities)
        loads = normalised([load.counts])
        masses = own_masses([bank], slots, loads)
        balance.append(float(cost.balancedness(masses, speeds)[0]))
        for rows, found in peaks.items():
            found.append(cost.slots_over_floor(loads, home, speeds, profile.top_k, rows))
        if before is not None:
            old, _ = slot_arrays([before[load.bank, load.layer]], capacities)
            moves += find_moves([load], old, slots, topology.nearness)
    return Plan(
        placement=placement,
        moves=tuple(moves),
        balancedness=tuple(balance),
        decode_slots_over_floor={rows: float(np.mean(found)) for rows, found in peaks.items()},
    )


def banks_of(
    profile: LoadProfile, placement: ExpertPlacement, name: str
) -> dict[tuple[str, int], BankPlacement]:
    """Banks by (bank, layer). Raises ``ConfigError`` unless they are those of the profile."""
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


def own_masses(banks: Sequence[BankPlacement], slots: Ints, loads: Floats) -> Floats:
    """Masses by the placements' own split weights."""
    width = slots.shape[2]
    shares = np.zeros(slots.shape)
    for b, bank in enumerate(banks):
        for d, split in enumerate(bank.split):
            held = split[:width]
            shares[b, d, : len(held)] = held
    load = np.take_along_axis(loads, np.maximum(slots, 0).reshape(len(slots), -1), axis=1)
    return np.where(slots == FREE_SLOT, 0.0, shares * load.reshape(slots.shape))
