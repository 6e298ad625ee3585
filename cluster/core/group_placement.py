"""The part of an expert placement that a step group uses, and placements made of such parts.

The decode group uses the copies that serve decode rows, the prefill group those that serve prompt
rows. If no device has copies of both kinds, each group has expert workers of its own:

    experts 0..3    device 0    device 1    device 2
    prefill         0 1         2 3
    decode                                  0 1 2 3

Once a device is lost, copies of its group replace its copies, or else copies of the other group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from cluster.core.placement import FREE_SLOT, BankPlacement, ExpertPlacement
from cluster.core.topology import StepGroup

PART_ROWS_PER_EXPERT = 8
"""Mean number of rows of each expert in a part of a prompt's exchange, between which CPUs serve
decodes. With this number, CPUs take longer to compute the rows than to read the weights, which each
part reads again."""
GroupDevices = Mapping[StepGroup, Sequence[int]]
"""Devices with the experts of each step group, ascending."""


def prompt_devices(bank: BankPlacement) -> frozenset[int]:
    """Return the devices that compute prompt rows of a bank, by its split weights."""
    return frozenset(d for d, shares in enumerate(bank.split) if any(share > 0 for share in shares))


def serves(placement: ExpertPlacement, device: int, group: StepGroup) -> bool:
    """Return whether a device takes part in the exchanges of a step group: all devices if all
    attention workers are one group."""
    if not group:
        return True
    if group == "decode":
        return any(device in bank.decode_device for bank in placement.banks)
    return any(any(share > 0 for share in bank.split[device]) for bank in placement.banks)


def bank_of(bank: BankPlacement, group: StepGroup) -> BankPlacement:
    """Return the bank's placement with the split weights and decode devices of a step group.

    All rows of the decode group use the decode devices, all rows of the prefill group the copies
    with a split weight. The slots stay.
    """
    if not group:
        return bank
    rows = bank.physical_to_logical
    if group == "decode":
        split = (
            tuple([float(e >= 0 and bank.decode_device[e] == d) for e in s])
            for d, s in enumerate(rows)
        )
        return replace(bank, split=tuple(split))
    first: dict[int, int] = {}
    is_used = set[tuple[int, int]]()
    for device, (slots, shares) in enumerate(zip(rows, bank.split, strict=True)):
        for expert, share in zip(slots, shares, strict=True):
            if expert != FREE_SLOT and share > 0:
                first.setdefault(expert, device)
                is_used.add((expert, device))
    pairs = enumerate(bank.decode_device)
    decode = (d if (expert, d) in is_used else first[expert] for expert, d in pairs)
    return replace(bank, decode_device=tuple(decode))


def part_on(placement: ExpertPlacement, devices: Sequence[int]) -> ExpertPlacement | None:
    """Return the placement on only ``devices``, which are renumbered from 0; None if these do not
    hold all experts."""
    lost = frozenset(range(placement.num_devices)) - set(devices)
    left = placement.without_devices(lost, placement.epoch)
    if left is None:
        return None
    number = {device: index for index, device in enumerate(devices)}
    banks = (
        replace(
            bank,
            physical_to_logical=tuple(bank.physical_to_logical[d] for d in devices),
            split=tuple(bank.split[d] for d in devices),
            decode_device=tuple(number[d] for d in bank.decode_device),
        )
        for bank in left.banks
    )
    return replace(left, banks=tuple(banks))


def joined(
    parts: Mapping[StepGroup, ExpertPlacement], devices: GroupDevices, num_devices: int
) -> ExpertPlacement:
    """Return the placement in which each step group has expert workers of its own.

    ``parts``: placement of each group on its ``devices`` alone, as of ``part_on``. Devices of no
    group are empty.
    """
    banks = []
    for prefill, decode in zip(parts["prefill"].banks, parts["decode"].banks, strict=True):
        rows: list[tuple[int, ...]] = [()] * num_devices
        split: list[tuple[float, ...]] = [()] * num_devices
        for i, device in enumerate(devices["prefill"]):
            rows[device], split[device] = prefill.physical_to_logical[i], prefill.split[i]
        for device, slots in zip(devices["decode"], decode.physical_to_logical, strict=True):
            rows[device], split[device] = slots, (0.0,) * len(slots)
        decoding = tuple(devices["decode"][index] for index in decode.decode_device)
        banks.append(
            replace(
                prefill, physical_to_logical=tuple(rows), split=tuple(split), decode_device=decoding
            )
        )
    return replace(parts["prefill"], banks=tuple(banks))


def own_devices(groups: Sequence[StepGroup]) -> GroupDevices | None:
    """Return the devices of each step group; None if the groups share them.

    ``groups``: group of each device, empty if it serves all groups.
    """
    found: dict[StepGroup, list[int]] = {"prefill": [], "decode": []}
    for device, group in enumerate(groups):
        if group:
            found[group].append(device)
    return found if all(found.values()) else None


def is_apart(bank: BankPlacement) -> bool:
    """Return whether no device of the bank serves both prompts and decodes."""
    return prompt_devices(bank).isdisjoint(bank.decode_device)
