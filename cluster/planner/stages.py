"""On the way to a placement: which slots can be filled now, and which copies may go for it.

A slot that is in force is never overwritten, so that a change goes in stages. Each stage fills
slots that are free in the placement in force, and is in force itself before the next one begins:

    now      device 0: 0 1 2    device 1: 2 3 0     (2 and 0 have two copies)
    target   device 0: 0 1 3    device 1: 2 3 1
    stage 1  device 0: 0 1 -    device 1: 2 3 -     copies that the target does not have
    stage 2  device 0: 0 1 3    device 1: 2 3 1     what is new, in the free slots

Every expert has a copy in every stage, and with a free slot on each device never fewer copies than
before or after. Where each device is full of only copies that others are to take, a copy that will
stay makes room for one stage.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from msgspec.structs import replace

from cluster.core.placement import FREE_SLOT, BankPlacement, ExpertPlacement


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotFill:
    """One expert that is to be loaded into a free slot."""

    bank: int
    """Place of the bank in the placement."""
    device: int
    slot: int
    """Expert slot, free in the placement in force; perhaps behind the last one of the maps."""
    expert: int
    sources: tuple[int, ...] = ()
    """Devices that hold it in the placement in force; empty: it is read from the checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One step of a change."""

    fills: tuple[SlotFill, ...]
    """What must be loaded before; may be empty."""
    placement: ExpertPlacement
    """What comes into force then. Shares of copies that go fall to those that stay, new copies have
    none yet: the planner's split is to follow."""


def next_stage(
    current: ExpertPlacement, target: ExpertPlacement, num_slots: int, devices: frozenset[int]
) -> Stage | None:
    """The next stage from ``current`` on the way to ``target``; None when nothing is left to do.

    Only what each of ``devices`` (those that live) holds counts, not in which slot; ``num_slots``
    is the capacity of each. The epoch is one above the current one.
    """
    changes = [
        _BankChange(now, then, num_slots, devices)
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
    """Experts that a device holds."""
    return frozenset(e for e in bank.physical_to_logical[device] if e != FREE_SLOT)


def is_reached(current: ExpertPlacement, target: ExpertPlacement) -> bool:
    """Whether every device holds the same experts."""
    return all(
        held_by(now, device) == held_by(then, device)
        for now, then in zip(current.banks, target.banks, strict=True)
        for device in range(now.num_devices)
    )


class _BankChange:
    """One bank during a change."""

    def __init__(
        self, now: BankPlacement, then: BankPlacement, num_slots: int, devices: frozenset[int]
    ) -> None:
        self._now = now
        self._devices = sorted(devices)
        self._rows = [list(row) for row in now.physical_to_logical]
        for device in self._devices:
            self._rows[device] += [FREE_SLOT] * (num_slots - len(self._rows[device]))
        self._wanted = [held_by(then, d) for d in range(now.num_devices)]
        self._copies = Counter(e for row in self._rows for e in row if e != FREE_SLOT)
        self.is_changed = False
        """Some slot has another content than before."""

    def fill(self, index: int) -> list[SlotFill]:
        """Load missing experts into free slots, as far as there are any.

        Experts come first whose unwanted copies on other devices can be dropped afterwards.
        """
        fills = []
        displaced = self._displaced()
        for device in self._devices:
            row = self._rows[device]
            free = [slot for slot, expert in enumerate(row) if expert == FREE_SLOT]
            lacking = self._wanted[device] - set(row)
            missing = sorted(lacking, key=lambda e: (e not in displaced, e))
            for slot, expert in zip(free, missing, strict=False):
                sources = self._now.holders(expert)
                fills.append(
                    SlotFill(bank=index, device=device, slot=slot, expert=expert, sources=sources)
                )
                row[slot] = expert
                self._copies[expert] += 1
                self.is_changed = True
        return fills

    def drop_replaced(self) -> None:
        """Empty the slots of unwanted copies, of experts whose wanted copies are all in place.

        So an expert never has fewer copies during the change than before or after it.
        """
        missing = {e for d in self._devices for e in self._wanted[d] - set(self._rows[d])}
        self._drop(missing)

    def drop_unwanted(self) -> None:
        """No slot changed: empty unwanted copies of all experts, as long as one copy stays."""
        self._drop(set())

    def _drop(self, kept: set[int]) -> None:
        for device in self._devices:
            for slot, expert in enumerate(self._rows[device]):
                if expert not in kept and expert not in self._wanted[device]:
                    self._empty(device, slot)

    def make_room(self) -> None:
        """Still no slot changed: empty a wanted copy for a stage, to make room for an expert.

        This expert can then leave a device where it is not wanted, so the stages come to an end.
        """
        displaced = self._displaced()
        for device in self._devices:
            row = self._rows[device]
            if FREE_SLOT in row or not displaced & (self._wanted[device] - set(row)):
                continue
            several = [(self._copies[e], -s) for s, e in enumerate(row) if self._copies[e] > 1]
            if several:
                self._empty(device, -max(several)[1])
                break

    def _displaced(self) -> set[int]:
        """Experts on devices that are not to have them."""
        unwanted = (set(self._rows[d]) - self._wanted[d] for d in self._devices)
        return set().union(*unwanted) - {FREE_SLOT}

    def _empty(self, device: int, slot: int) -> None:
        expert = self._rows[device][slot]
        if expert != FREE_SLOT and self._copies[expert] > 1:
            self._copies[expert] -= 1
            self._rows[device][slot] = FREE_SLOT
            self.is_changed = True

    def result(self) -> BankPlacement:
        """The maps as they are now; the very same object where nothing changed."""
        return self._now.with_slots(self._rows) if self.is_changed else self._now
