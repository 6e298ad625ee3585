"""Plans the experts of each step group on the group's own devices. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from cluster.core.group_placement import joined, part_on
from cluster.core.placement import ExpertPlacement
from cluster.core.topology import StepGroup
from cluster.planner.base import PlannedTopology

PlanPart = Callable[[StepGroup, PlannedTopology, ExpertPlacement | None], ExpertPlacement]
"""Plans the placement of one step group on its devices, from the current one or from scratch."""


def plan_groups(
    topology: PlannedTopology, current: ExpertPlacement | None, plan_part: PlanPart
) -> ExpertPlacement | None:
    """Return a placement in which each step group has its own devices.

    None if the groups share the devices, or if a group's devices do not hold all experts in
    ``current``: then the placement is planned as a whole. ``plan_part`` gets only the devices of a
    group, numbered from 0. Raises its errors.
    """
    devices = topology.groups
    if devices is None:
        return None
    parts: dict[StepGroup, ExpertPlacement] = {}
    for group, own in devices.items():
        part = None if current is None else part_on(current, own)
        if part is None and current is not None:
            return None
        of_group = tuple(replace(topology.devices[d], group="") for d in own)
        parts[group] = plan_part(group, replace(topology, devices=of_group), part)
    return joined(parts, devices, topology.num_devices)
