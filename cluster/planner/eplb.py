"""EPLB, the public expert-parallel load balancer, as the baseline for the default planner.

Source: github.com/deepseek-ai/EPLB, ``rebalance_experts`` and its published example; an independent
implementation. Two policies: *hierarchical* packs groups of experts onto nodes and balances within
each node, *global* treats all devices as one node. Both give each spare slot to the expert with the
largest load per copy, then pack the copies by falling load onto the lightest device with a free
slot. Copies take equal shares.

Difference: in these maps no device holds an expert twice. If EPLB puts two copies of one expert on
a device, one slot stays free and the other takes both shares. The loads are the same.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np

from cluster.core.checks import check
from cluster.core.load_profile import LoadProfile
from cluster.core.placement import FREE_SLOT, BankPlacement, ExpertPlacement
from cluster.planner.assess import assess
from cluster.planner.base import Floats, Ints, Plan, PlannedTopology


def rebalance(
    loads: Floats, *, num_slots: int, num_devices: int, num_groups: int = 1, num_nodes: int = 1
) -> Ints:
    """Run EPLB: return the expert of each slot, [num_banks, num_slots].

    Device d has the d-th block of ``num_slots / num_devices`` slots. ``loads`` has the shape
    [num_banks, num_experts]. The policy is hierarchical if the number of nodes divides the number
    of groups, else global. Raises ``ConfigError`` if numbers are not divisible as required.
    """
    if num_groups % num_nodes:
        num_groups, num_nodes = 1, 1
    experts = loads.shape[1]
    check(experts % num_groups == 0, "num_groups", num_groups, f"must divide {experts} experts")
    check(num_devices % num_nodes == 0, "num_nodes", num_nodes, "must divide the devices")
    check(num_slots % num_devices == 0, "num_slots", num_slots, "must be a multiple of devices")
    check(num_slots >= experts, "num_slots", num_slots, f"must be at least {experts}")
    return np.array(
        [_one_bank(load, num_slots, num_devices, num_groups, num_nodes) for load in loads]
    )


def _one_bank(
    load: Floats, num_slots: int, num_devices: int, num_groups: int, num_nodes: int
) -> Ints:
    groups = np.arange(len(load)).reshape(num_groups, -1)
    result = []
    for node in _packed(load[groups].sum(1), num_nodes):
        members = groups[node].ravel()
        copies, count = _replicated(load[members], num_slots // num_nodes)
        share = (load[members] / count)[copies]
        for device in _packed(share, num_devices // num_nodes):
            result.append(members[copies[device]])
    return np.concatenate(result)


def _packed(weights: Floats, num_packs: int) -> list[list[int]]:
    """Distribute items to packs of equal size; return the indices of the items of each pack.

    The heaviest items come first; each goes into the lightest pack with space.
    """
    size = len(weights) // num_packs
    if size == 1:
        return [[i] for i in range(num_packs)]
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    with_room = [(0.0, pack) for pack in range(num_packs)]
    for item in np.argsort(-weights, kind="stable").tolist():
        total, pack = heapq.heappop(with_room)  # the first of equally light ones
        packs[pack].append(item)
        if len(packs[pack]) < size:
            heapq.heappush(with_room, (total + float(weights[item]), pack))
    return packs


def _replicated(load: Floats, num_copies: int) -> tuple[Ints, Ints]:
    """Return the expert of each of ``num_copies`` copies, and the number of copies by expert.

    Each further copy goes to the expert with the largest load per copy.
    """
    count = np.ones(len(load), dtype=np.int64)
    copies = list(range(len(load)))
    while len(copies) < num_copies:
        busiest = int((load / count).argmax())
        copies.append(busiest)
        count[busiest] += 1
    return np.array(copies), count


def plan(
    profile: LoadProfile, topology: PlannedTopology, current: ExpertPlacement | None = None
) -> Plan:
    """Return the placement of EPLB, planned from scratch regardless of the current placement.

    Raises ``ConfigError`` for devices with different numbers of slots, which EPLB does not support.
    """
    banks = []
    for load in profile.banks:
        capacities = topology.capacities(len(load.counts))
        equal = bool((capacities == capacities[0]).all())
        check(equal, "num_expert_slots", capacities.tolist(), "must be equal for eplb")
        found = rebalance(
            np.array([load.counts], dtype=np.float64),
            num_slots=int(capacities.sum()),
            num_devices=len(capacities),
        )
        maps = found[0].reshape(len(capacities), -1).tolist()
        banks.append(equally_shared(load.bank, load.layer, len(load.counts), maps))
    epoch = 1 if current is None else current.epoch + 1
    placement = ExpertPlacement(epoch=epoch, banks=tuple(banks))
    return assess(profile, topology, placement, current)


def equally_shared(
    bank: str, layer: int, num_experts: int, maps: Sequence[Sequence[int]]
) -> BankPlacement:
    """Return the placement of a bank in which the copies of an expert take equal shares.

    ``maps`` are the experts by device and slot. A second copy on a device becomes a free slot,
    and the first copy takes both shares.
    """
    copies = Counter(itertools.chain.from_iterable(maps))
    slots_out, split = [], []
    for slots in map(list, maps):
        kept = [e if e not in slots[:i] else FREE_SLOT for i, e in enumerate(slots)]
        split.append([slots.count(e) / copies[e] if e != FREE_SLOT else 0.0 for e in kept])
        slots_out.append(kept)
    return BankPlacement.from_maps(
        bank=bank, layer=layer, num_experts=num_experts, physical_to_logical=slots_out, split=split
    )
