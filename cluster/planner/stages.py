"""Divides a change of placement into stages, because no slot in use may be overwritten.

Each stage drops copies that are not needed and fills slots that are free in the placement in force.
A stage takes effect before the next stage begins:

    now      device 0: 0 1 2    device 1: 2 3 0     (2 and 0 have two copies)
    target   device 0: 0 1 3    device 1: 2 3 1
    stage 1  device 0: 0 1 -    device 1: 2 3 -     dropped copies that the target does not have
    stage 2  device 0: 0 1 3    device 1: 2 3 1     new copies in the free slots

Every expert has a copy in every stage and, if each device has a free slot, never fewer copies than
before or after. If all slots hold single copies that other devices should take, a copy that the
target keeps is dropped for one stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from msgspec.structs import replace

from cluster.core.group_placement import GroupDevices
from cluster.core.placement import FREE_SLOT, BankPlacement, ExpertPlacement
from cluster.core.topology import StepGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotFill:
    """One expert to load into a free expert slot of a device."""

    bank: int
    """Index of the bank in the placement."""
    device: int
    slot: int
    """Expert slot of the device that is free in the placement in force; it may be after the last
    slot that the placement lists."""
    expert: int
    sources: tuple[int, ...] = ()
    """Devices that hold the expert in the placement in force; if empty, the checkpoint is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One step of a change of the placement: experts to load, then a placement that uses them."""

    fills: tuple[SlotFill, ...]
    """Experts to load before the placement of the stage takes effect; may be empty."""
    placement: ExpertPlacement
    """Placement after the stage. Remaining copies take the shares of dropped copies; new copies
    have no share until the planner's split weights are applied."""


def next_stage(
    current: ExpertPlacement,
    target: ExpertPlacement,
    num_slots: int,
    devices: frozenset[int],
    groups: GroupDevices | None = None,
) -> Stage | None:
    """Return the next stage from ``current`` to ``target``; None if no stage is left or possible.

    Only the set of experts on each of ``devices`` (the live ones) matters, not their slots;
    ``num_slots`` is the number of slots per bank of each device. The placement of the stage has the
    epoch after that of ``current``. ``groups``: devices of step groups that have their own; each
    group keeps a copy of an expert if it has one.
    """
    group_of = {d: group for group, own in (groups or {}).items() for d in own}
    changes = [
        _BankChange(now, then, num_slots, devices, group_of)
        for now, then in zip(current.banks, target.banks, strict=True)
    ]
    fills = [fill for index, change in enumerate(changes) for fill in change.fill(index)]
    ways = (_BankChange.drop_replaced, _BankChange.drop_unwanted, _BankChange.make_room)
    for way in ways:
        for change in changes:
            way(change)
        if any(change.is_changed for change in changes):
            banks = tuple(change.result() for change in changes)
            placement = replace(current, epoch=current.epoch + 1, banks=banks)
            return Stage(fills=tuple(fills), placement=placement)
    return None


def held_by(bank: BankPlacement, device: int) -> frozenset[int]:
    """Return the experts of a bank that a device holds."""
    return frozenset(e for e in bank.physical_to_logical[device] if e != FREE_SLOT)


def is_reached(current: ExpertPlacement, target: ExpertPlacement) -> bool:
    """Return whether every device holds the same experts in ``current`` as in ``target``."""
    return all(
        held_by(now, device) == held_by(then, device)
        for now, then in zip(current.banks, target.banks, strict=True)
        for device in range(now.num_devices)
    )


class _BankChange:
    """One bank during one stage of a placement change: its maps, and the wanted experts."""

    def __init__(
        self,
        now: BankPlacement,
        then: BankPlacement,
        num_slots: int,
        devices: frozenset[int],
        group_of: Mapping[int, StepGroup],
    ) -> None:
        """``group_of``: the step group of a device that serves only one; empty for no device."""
        self._now = now
        self._group_of = group_of
        self._devices = sorted(devices)
        self._rows = [list(row) for row in now.physical_to_logical]
        for device in self._devices:
            self._rows[device] += [FREE_SLOT] * (num_slots - len(self._rows[device]))
        self._wanted = [held_by(then, d) for d in range(now.num_devices)]
        self._copies = Counter(
            self._key(d, e) for d, row in enumerate(self._rows) for e in row if e != FREE_SLOT
        )
        self.is_changed = False
        """Whether the contents of any slot of the bank have changed in this stage."""

    def fill(self, index: int) -> list[SlotFill]:
        """Put missing experts into free slots; return the loads of these slots.

        Experts whose unwanted copies on other devices can be dropped afterwards come first.
        ``index`` is the index of the bank in the placement.
        """
        fills = []
        displaced = self._displaced()
        for device in self._devices:
            row = self._rows[device]
            free = [slot for slot, expert in enumerate(row) if expert == FREE_SLOT]
            lacking = [self._key(device, e) for e in self._wanted[device] - set(row)]
            ordered = sorted(lacking, key=lambda key: (key not in displaced, key))
            missing = [expert for _, expert in ordered]
            for slot, expert in zip(free, missing, strict=False):
                sources = self._now.holders(expert)
                fills.append(
                    SlotFill(bank=index, device=device, slot=slot, expert=expert, sources=sources)
                )
                row[slot] = expert
                self._copies[self._key(device, expert)] += 1
                self.is_changed = True
        return fills

    def _key(self, device: int, expert: int) -> tuple[StepGroup, int]:
        """Return what counts the copies of an expert: by step group if these have devices."""
        return self._group_of.get(device, ""), expert

    def drop_replaced(self) -> None:
        """Empty the slots of unwanted copies, for experts whose wanted copies are all in place.

        Therefore an expert never has fewer copies during the change than before or after it. The
        last copy of an expert stays.
        """
        self._drop(
            {self._key(d, e) for d in self._devices for e in self._wanted[d] - set(self._rows[d])}
        )

    def drop_unwanted(self) -> None:
        """Empty the slots of all unwanted copies, for experts that have another copy.

        Called if ``fill`` and ``drop_replaced`` changed no slot of any bank.
        """
        self._drop(set())

    def _drop(self, kept: set[tuple[StepGroup, int]]) -> None:
        for device in self._devices:
            for slot, expert in enumerate(self._rows[device]):
                is_kept = self._key(device, expert) in kept
                if not is_kept and expert not in self._wanted[device]:
                    self._empty(device, slot)

    def make_room(self) -> None:
        """Empty the slot of a wanted copy for one stage, so that another expert can use the slot.

        The other expert can then leave a device on which it is not wanted, so that the stages end.
        Called if ``drop_unwanted`` changed no slot of any bank either.
        """
        displaced = self._displaced()
        for device in self._devices:
            row = self._rows[device]
            lacking = {self._key(device, e) for e in self._wanted[device] - set(row)}
            if FREE_SLOT in row or not displaced & lacking:
                continue
            copies = [(self._copies[self._key(device, e)], -s) for s, e in enumerate(row)]
            if several := [found for found in copies if found[0] > 1]:
                self._empty(device, -max(several)[1])
                break

    def _displaced(self) -> set[tuple[StepGroup, int]]:
        """Return the experts that a device holds, but should not hold in the target placement."""
        return {
            self._key(d, e)
            for d in self._devices
            for e in set(self._rows[d]) - self._wanted[d] - {FREE_SLOT}
        }

    def _empty(self, device: int, slot: int) -> None:
        expert = self._rows[device][slot]
        key = self._key(device, expert)
        if expert != FREE_SLOT and self._copies[key] > 1:
            self._copies[key] -= 1
            self._rows[device][slot] = FREE_SLOT
            self.is_changed = True

    def result(self) -> BankPlacement:
        """Return the bank's placement after the stage; the same object as before if unchanged."""
        return self._now.with_slots(self._rows) if self.is_changed else self._now
