"""Plans the experts of each step group on the group's own devices. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from cluster.core.group_placement import joined, part_on
from cluster.core.placement import FREE_SLOT, ExpertPlacement
from cluster.core.topology import StepGroup
from cluster.planner.base import PlannedTopology
from cluster.planner.stages import held_by

PlanPart = Callable[[StepGroup, PlannedTopology, ExpertPlacement | None], ExpertPlacement]
"""Plans the placement of one step group on its devices, from the current one or from scratch."""


def plan_groups(
    topology: PlannedTopology, current: ExpertPlacement | None, plan_part: PlanPart
) -> ExpertPlacement | None:
    """Return a placement in which each step group has its own devices.

    None if the groups share the devices. ``plan_part`` gets only the devices of a group, numbered
    from 0, with the experts that the group lacks in ``current`` added. Raises its errors.
    """
    devices = topology.groups
    if devices is None:
        return None
    parts: dict[StepGroup, ExpertPlacement] = {}
    for group, own in devices.items():
        part = None if current is None else part_on(_completed(current, own, topology), own)
        of_group = tuple(replace(topology.devices[d], group="") for d in own)
        parts[group] = plan_part(group, replace(topology, devices=of_group), part)
    return joined(parts, devices, topology.num_devices)


def num_incomplete(topology: PlannedTopology, placement: ExpertPlacement) -> int:
    """Return the number of (bank, step group) pairs in which a group with devices of its own lacks
    an expert."""
    return sum(
        len(set().union(*(held_by(bank, d) for d in own))) < bank.num_experts
        for own in (topology.groups or {}).values()
        for bank in placement.banks
    )


def _completed(
    placement: ExpertPlacement, devices: Sequence[int], topology: PlannedTopology
) -> ExpertPlacement:
    """Return the placement with all experts on ``devices``: missing ones in free slots, or else in
    place of second copies."""
    banks = []
    for bank in placement.banks:
        rows = [[*row] for row in bank.physical_to_logical]
        copies = Counter(e for d in devices for e in held_by(bank, d))
        lacking = [e for e in range(bank.num_experts) if not copies[e]]
        capacities = topology.capacities(bank.num_experts) if lacking else ()
        for expert in lacking:
            free = {d: capacities[d] - len(set(rows[d]) - {FREE_SLOT}) for d in devices}
            device = max(devices, key=free.__getitem__)
            if free[device] > 0 and FREE_SLOT not in rows[device]:
                rows[device].append(expert)
                continue
            if free[device] > 0:
                slot = rows[device].index(FREE_SLOT)
            else:
                places = [(d, s) for d in devices for s in range(len(rows[d]))]
                device, slot = max(places, key=lambda place: copies[rows[place[0]][place[1]]])
                copies[rows[device][slot]] -= 1
            rows[device][slot] = expert
            copies[expert] += 1
        banks.append(bank.with_slots(rows) if lacking else bank)
    return msgspec.structs.replace(placement, banks=tuple(banks))
