"""The plan that ignores the load: experts in order."""

from __future__ import annotations

from cluster.core.checks import check
from cluster.core.load_profile import LoadProfile
from cluster.core.placement import ExpertPlacement, contiguous
from cluster.planner.assess import assess
from cluster.planner.base import Plan, PlannedTopology


def contiguous_plan(
    profile: LoadProfile, topology: PlannedTopology, current: ExpertPlacement | None = None
) -> Plan:
    """Experts in order, a block on each device: the first placement where no load is known.

    Raises ``ConfigError`` for devices that say their number of slots: blocks are equal.
    """
    own = [d.num_expert_slots for d in topology.devices if d.num_expert_slots is not None]
    check(not own, "num_expert_slots", own, "must not be given for a contiguous plan")
    epoch = 1 if current is None else current.epoch + 1
    placement = contiguous(profile.bank_shapes, topology.num_devices, topology.num_redundant, epoch)
    return assess(profile, topology, placement, current)
