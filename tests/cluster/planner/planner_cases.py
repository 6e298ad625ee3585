"""Random planning problems for property tests, and what every placement must keep."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st

from cluster.core.load_profile import BankLoad, LoadProfile
from cluster.core.placement import FREE_SLOT, BankPlacement
from cluster.planner.base import Floats, PlannedDevice, PlannedTopology


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Loads of some banks, and devices with slots enough for them."""

    profile: LoadProfile
    """The load to plan for."""
    later: LoadProfile
    """The load of the same banks at another time."""
    topology: PlannedTopology
    """Devices, unequal ones among them."""


def make_profile(counts: Floats, top_k: int = 2) -> LoadProfile:
    """A profile of one bank per row."""
    banks = tuple(
        BankLoad(bank="mlp", layer=layer, counts=tuple(map(float, row)))
        for layer, row in enumerate(counts)
    )
    return LoadProfile(model="test", top_k=top_k, tokens=1000, banks=banks)


@st.composite
def problems(draw: st.DrawFn, max_nodes: int = 3) -> Problem:
    """Banks with skewed, even and missing loads on devices of all kinds."""
    experts = draw(st.integers(1, 12))
    devices = draw(st.integers(1, 6))
    slots = draw(
        st.lists(st.integers(0, experts + 1), min_size=devices, max_size=devices).filter(
            lambda s: sum(min(n, experts) for n in s) >= experts
        )
    )
    made = tuple(
        PlannedDevice(
            num_expert_slots=n,
            speed=draw(st.sampled_from([0.5, 1.0, 1.0, 2.0])),
            node=f"node-{draw(st.integers(0, max_nodes - 1))}",
        )
        for n in slots
    )
    generator = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    skew = draw(st.sampled_from([0.0, 0.5, 1.5, 4.0]))
    banks = draw(st.integers(1, 3))
    now, later = np.exp(skew * generator.normal(size=(2, banks, experts)))
    now[generator.random(now.shape) < draw(st.sampled_from([0.0, 0.3]))] = 0.0
    top_k = min(2, experts)
    return Problem(
        profile=make_profile(now, top_k),
        later=make_profile(later, top_k),
        topology=PlannedTopology(devices=made),
    )


def check_bank(bank: BankPlacement, topology: PlannedTopology) -> None:
    """Every expert placed, no device too full, no two copies on a device, maps that agree."""
    for expert in range(bank.num_experts):
        copies = bank.logical_to_physical(expert)
        assert copies
        assert abs(sum(bank.split[d][s] for d, s in copies) - 1.0) < 1e-9
        assert bank.decode_device[expert] in {d for d, _ in copies}
    assert all(0.0 <= share <= 1.0 + 1e-9 for split in bank.split for share in split)
    capacities = topology.capacities(bank.num_experts).tolist()
    for slots, capacity in zip(bank.physical_to_logical, capacities, strict=True):
        held = [e for e in slots if e != FREE_SLOT]
        assert len(slots) <= capacity
        assert len(set(held)) == len(held)


def nodes_of(bank: BankPlacement, expert: int, topology: PlannedTopology) -> set[str]:
    """Nodes that hold a copy."""
    return {topology.devices[d].node for d, _ in bank.logical_to_physical(expert)}


def domains_of(bank: BankPlacement, expert: int, topology: PlannedTopology) -> set[int]:
    """Failure domains that hold a copy."""
    return {int(topology.domains[d]) for d, _ in bank.logical_to_physical(expert)}
