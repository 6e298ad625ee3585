"""Types of the planners: devices, limits and the resulting plan.

The algorithms process all banks with equal numbers of experts together, as arrays:

    slots       [num_banks, num_devices, num_slots] int64, expert in a slot, ``FREE_SLOT`` for none
    loads       [num_banks, num_experts] float64, each bank's loads divided by their sum
    slot_loads  [num_banks, num_devices, num_slots] float64, share of the bank's load in a slot
    primary     [num_banks, num_experts] int64, the device of the primary copy, which serves decodes

The utilization of a device is its load over its speed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.core.checks import check
from cluster.core.errors import ConfigError
from cluster.core.group_placement import GroupDevices, own_devices
from cluster.core.load_profile import BankLoad, LoadProfile
from cluster.core.placement import FREE_SLOT, BankPlacement, ExpertPlacement
from cluster.core.topology import Member, StepGroup
from cluster.planner.stages import held_by

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedDevice:
    """A device of a placement plan, such as an expert worker, that may hold experts."""

    num_expert_slots: int | None = None
    """Number of expert slots for each bank; None for an equal share plus the spare slots."""
    speed: float = 1.0
    """Relative speed of the device, to which its load should be proportional."""
    node: str = ""
    domain: str = ""
    """Failure domain of the device; empty if the node is the failure domain."""
    link_class: str = ""
    """Link class, a set of devices with fast links between them; empty if the node is the set."""
    group: StepGroup = ""
    """The only step group that the device serves; empty if it serves all."""

    def __post_init__(self) -> None:
        count = self.num_expert_slots
        check(count is None or count >= 0, "num_expert_slots", count, "must not be negative")
        check(0 < self.speed < float("inf"), "speed", self.speed, "must be positive and finite")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTopology:
    """All devices of a placement, with their slots, speeds and positions in the network."""

    devices: tuple[PlannedDevice, ...]
    """Devices by their index in the placement."""
    num_redundant: int = 0
    """Number of spare slots per bank on each device that has no ``num_expert_slots``."""
    has_one_domain: bool = False
    """Whether all devices can fail together; if so, ``domains`` has one domain for each device."""

    def __post_init__(self) -> None:
        check(bool(self.devices), "num_devices", 0, "must be at least 1")
        check(self.num_redundant >= 0, "num_redundant", self.num_redundant, "must not be negative")

    @classmethod
    def uniform(
        cls,
        num_devices: int,
        num_redundant: int = 0,
        num_nodes: int = 1,
        speeds: Sequence[float] | None = None,
    ) -> PlannedTopology:
        """Return devices with equal numbers of slots, in equal blocks on ``num_nodes`` nodes.

        ``num_redundant`` is the number of spare slots per bank of a device; ``speeds`` is 1 by
        default.
        """
        check(num_devices >= 1, "num_devices", num_devices, "must be at least 1")
        rule = f"must be from 1 to the number of devices ({num_devices})"
        check(1 <= num_nodes <= num_devices, "num_nodes", num_nodes, rule)
        speeds = [1.0] * num_devices if speeds is None else speeds
        rule = f"must be one for each of the {num_devices} devices"
        check(len(speeds) == num_devices, "speeds", len(speeds), rule)
        nodes = [f"node-{d * num_nodes // num_devices}" for d in range(num_devices)]
        devices = tuple(
            PlannedDevice(node=node, speed=speed) for node, speed in zip(nodes, speeds, strict=True)
        )
        return cls(devices=devices, num_redundant=num_redundant)

    @property
    def num_devices(self) -> int:
        return len(self.devices)

    @property
    def groups(self) -> GroupDevices | None:
        """The devices of each step group; None if all groups share the devices."""
        return own_devices([device.group for device in self.devices])

    def shared(self) -> PlannedTopology:
        """Return the topology in which all step groups share the devices."""
        return replace(self, devices=tuple(replace(d, group="") for d in self.devices))

    @property
    def nodes(self) -> Ints:
        """Index of each device's node, [num_devices]."""
        return _indices([d.node for d in self.devices])

    @property
    def domains(self) -> Ints:
        """Index of each device's failure domain, [num_devices]."""
        return _indices([("domain", d.domain) if d.domain else (d.node,) for d in self.devices])

    @property
    def nearness(self) -> Ints:
        """Nearness of each pair of devices: 2 on one node, 1 in one link class, else 0.

        The shape is [num_devices, num_devices].
        """
        links = _indices(
            [("link", d.link_class) if d.link_class else (d.node,) for d in self.devices]
        )
        nodes = self.nodes
        same_node = nodes[:, None] == nodes[None, :]
        return np.where(same_node, 2, links[:, None] == links[None, :]).astype(np.int64)

    def capacities(self, num_experts: int) -> Ints:
        """Return the slots of each device for a bank of ``num_experts`` experts, [num_devices].

        Raises ``ConfigError`` if the devices have too few slots in total.
        """
        sizes = Counter(d.group for d in self.devices)
        own = [
            -(-num_experts // sizes[d.group]) + self.num_redundant
            if d.num_expert_slots is None
            else d.num_expert_slots
            for d in self.devices
        ]
        total = sum(min(slots, num_experts) for slots in own)
        rule = f"must be at least num_experts ({num_experts}) in total"
        check(total >= num_experts, "num_expert_slots", total, rule)
        return np.array(own)

    def speeds(self, num_experts: int, group: StepGroup = "") -> Floats:
        """Return relative speeds, [num_devices], with sum 1; 0 for a device without slots, and for
        a device that does not serve ``group``."""
        serves = [not group or d.group in ("", group) for d in self.devices]
        speed = np.array([d.speed for d in self.devices])
        speed = np.where((self.capacities(num_experts) > 0) & serves, speed, 0.0)
        return np.asarray(speed / speed.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """Options of the default planner: its move limit, and the decode step that it optimizes."""

    max_move_fraction: float | None = None
    """Maximum share of all slots that may get another expert, 0 to 1; None for no limit."""
    decode_tokens: int = 16
    """Rows of the decode step for which decode devices are optimized."""

    def __post_init__(self) -> None:
        share = self.max_move_fraction
        check(share is None or 0 <= share <= 1, "max_move_fraction", share, "must be from 0 to 1")
        check(self.decode_tokens >= 1, "decode_tokens", self.decode_tokens, "must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """One expert slot that gets another expert when the placement changes."""

    bank: str
    layer: int
    device: int
    slot: int
    expert: int
    source: int
    """Device that holds the expert now, on the same node if possible; -1 if no device does."""

    def to_dict(self) -> dict[str, Any]:
        """Return the move as plain data, in the format of placement files."""
        return {
            "bank": self.bank,
            "layer": self.layer,
            "device": self.device,
            "slot": self.slot,
            "expert": self.expert,
            "from": self.source,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Result of a planner: a placement, its predicted balance, and the slots that change."""

    placement: ExpertPlacement
    """The planned placement, with experts by slot, split weights and decode devices."""
    moves: tuple[Move, ...]
    """Slots that get another expert than now; empty if there is no current placement."""
    balancedness: tuple[float, ...]
    """Predicted balancedness of each bank: mean over maximum of the devices' load over speed."""
    decode_slots_over_floor: Mapping[int, float]
    """Rows of a decode step -> expected activated slots of the busiest device, over their minimum.

    Averaged over the banks.
    """

    @property
    def move_fraction(self) -> float:
        """Number of moves divided by the number of all slots."""
        slots = (len(s) for b in self.placement.banks for s in b.physical_to_logical)
        return len(self.moves) / max(sum(slots), 1)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data: a placement file with keys ``predicted`` and ``moves``."""
        mean = sum(self.balancedness) / len(self.balancedness)
        predicted = {
            "balancedness": {"mean": mean, "min": min(self.balancedness)},
            "decode_slots_over_floor": {str(b): v for b, v in self.decode_slots_over_floor.items()},
        }
        moves = [m.to_dict() for m in self.moves]
        return {**self.placement.to_dict(), "predicted": predicted, "moves": moves}


def _indices(names: Sequence[Hashable]) -> Ints:
    """Return a number for each name; equal names get equal numbers, 0 is the first name."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names])


def planned_device(member: Member, num_slots: int | None = None) -> PlannedDevice:
    """Convert a worker to a device of the planner, with ``num_slots`` slots per bank."""
    return PlannedDevice(
        num_expert_slots=num_slots,
        speed=member.speed,
        node=member.node,
        domain=member.domain,
        link_class=member.link_class,
        group=member.group if member.role == "expert" else "",
    )


def planned_topology(
    experts: Sequence[Member], placement: ExpertPlacement, num_slots: int
) -> PlannedTopology:
    """Return the devices of a placement, each with ``num_slots`` slots per bank, or fewer in a step
    group that has more devices of its own than the other one.

    A device that holds more experts (for example after a recovery) has a slot for each of them. A
    device without a worker in ``experts`` has no slots. If all workers are in one failure domain,
    each worker becomes its own. Step groups share the devices if a group has too few slots.
    """
    by_device = {m.device: m for m in experts}
    most = max((bank.num_experts for bank in placement.banks), default=0)
    sizes = Counter(m.group for m in experts)
    parts = {group: -(-most // size) for group, size in sizes.items()}
    spare = max(num_slots - max(parts.values(), default=0), 0)
    slots = {group: min(spare + part, num_slots) for group, part in parts.items()}
    is_spread = len({m.domain or m.node for m in experts}) > 1
    domains = {m.device: m.domain if is_spread else m.name for m in experts}
    held = [
        max(len(held_by(bank, d)) for bank in placement.banks) for d in range(placement.num_devices)
    ]
    devices = tuple(
        replace(planned_device(m, max(slots[m.group], held[d])), domain=domains[d])
        if (m := by_device.get(d)) is not None
        else PlannedDevice(num_expert_slots=0)
        for d in range(placement.num_devices)
    )
    topology = PlannedTopology(devices=devices, has_one_domain=not is_spread)
    rooms = [
        sum(devices[d].num_expert_slots or 0 for d in own)
        for own in (topology.groups or {}).values()
    ]
    return topology if rooms and min(rooms) >= most else topology.shared()


def equally_large(profile: LoadProfile) -> Iterator[tuple[BankLoad, ...]]:
    """Yield the banks of a load profile in groups with equal numbers of experts."""
    for experts in dict.fromkeys(len(b.counts) for b in profile.banks):
        yield tuple(b for b in profile.banks if len(b.counts) == experts)


def normalised(counts: Sequence[Sequence[float]]) -> Floats:
    """Divide each bank's expert loads by their sum; a bank without load gets equal loads."""
    loads = np.array(counts, dtype=np.float64)
    total = loads.sum(1, keepdims=True)
    even = np.full_like(loads, 1.0 / loads.shape[1])
    return np.where(total > 0, loads / np.where(total > 0, total, 1.0), even)


def relative_speeds(speeds: Floats) -> Floats:
    """Return speeds relative to the mean of the devices with slots, [num_devices].

    ``speeds`` is 0 for a device without slots; its relative speed is 1.
    """
    return np.where(speeds > 0, speeds * (speeds > 0).sum(), 1.0)


def slot_arrays(banks: Sequence[BankPlacement], capacities: Ints) -> tuple[Ints, Ints]:
    """Return the arrays ``slots`` and ``primary`` of placed banks (see ``planner.base``).

    ``capacities`` [num_devices] are numbers of slots. Raises ``ConfigError`` if a device has too
    few slots for its experts, or if the number of devices differs.
    """
    width = int(capacities.max())
    slots = np.full((len(banks), len(capacities), width), FREE_SLOT)
    for b, bank in enumerate(banks):
        where = f"current placement of bank {bank.bank} layer {bank.layer}"
        rule = f"must have the {len(capacities)} devices of the topology"
        check(bank.num_devices == len(capacities), where, bank.num_devices, rule)
        for d, held in enumerate(bank.physical_to_logical):
            if len(held) > capacities[d] and any(e != FREE_SLOT for e in held[capacities[d] :]):
                raise ConfigError(where, len(held), f"device {d} has {capacities[d]} slots")
            slots[b, d, : min(len(held), width)] = held[:width]
    return slots, np.array([bank.decode_device for bank in banks])


def build_placement(
    loads: Sequence[BankLoad], slots: Ints, shares: Floats, primary: Ints, capacities: Ints
) -> list[BankPlacement]:
    """Convert the arrays of a plan to the placements of banks, cut to each device's slots.

    ``shares`` are the split weights of the slots; ``capacities`` [num_devices] the slot counts.
    """
    banks = []
    for b, load in enumerate(loads):
        maps, split = slots[b].tolist(), shares[b].tolist()
        banks.append(
            BankPlacement.from_maps(
                bank=load.bank,
                layer=load.layer,
                num_experts=len(load.counts),
                physical_to_logical=[s[:n] for s, n in zip(maps, capacities, strict=True)],
                split=[s[:n] for s, n in zip(split, capacities, strict=True)],
                decode_device=primary[b].tolist(),
            )
        )
    return banks
