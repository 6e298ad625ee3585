"""The expert slots that received rows name: their check, and the count of their pairs.

On a CPU both look at the slots at once. On a GPU that would make the host wait in every exchange,
so a slot without an expert is taken out of its rows there and then, and named at the end of the
step, when the counts come to the host in the same copy: the step waits once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor

from cluster.core.placement import FREE_SLOT
from workers.model.host_copies import to_host, to_host_later

Reject = Callable[[int, str], NoReturn]
"""``DataTransport.reject``."""


@dataclass(frozen=True, slots=True)
class FilledSlots:
    """Which slots of one bank hold an expert in an epoch."""

    bank: int
    """``BankSpec.index``."""
    table: Tensor
    """[slots + 1] bool; the last entry stands for slot -1, a pair of another rank: no error."""
    has_free: bool

    @classmethod
    def of(cls, bank: int, experts: Sequence[int], device: torch.device) -> FilledSlots:
        """Of the expert, or ``FREE_SLOT``, of each slot."""
        filled = [expert != FREE_SLOT for expert in experts]
        return cls(bank, torch.tensor([*filled, True], device=device), FREE_SLOT in experts)

    def blame(self, ranks: Sequence[int], slots: Sequence[Tensor], reject: Reject) -> None:
        """Close the edge of a rank that named a missing or empty slot in [rows, k]."""
        filled = self.table.tolist()[:-1]
        for rank, mine in zip(ranks, slots, strict=True):
            for slot in mine.flatten().tolist():
                if slot != -1 and not (0 <= slot < len(filled) and filled[slot]):
                    reject(rank, f"no expert in slot {slot} of bank {self.bank}")


@dataclass(frozen=True, slots=True)
class UsedSlots:
    """The slots of one exchange's rows, checked."""

    slots: Tensor
    """[rows, k] int64, -1: not here."""
    all_here: bool
    """Every place is a pair of this rank; False where that is not known."""
    any_here: bool
    """Some place is; True where that is not known."""


class SlotUse(Protocol):
    """Checks and counts slots, on the device where the experts are."""

    def begin(self, counts: Sequence[Tensor]) -> None:
        """Begin a step; the last one may have broken."""

    def check(
        self, filled: FilledSlots, ranks: Sequence[int], slots: Sequence[Tensor], reject: Reject
    ) -> UsedSlots:
        """Slots [rows, k] int64 of each rank; raises what ``reject`` raises, now or at the end."""

    def count(self, filled: FilledSlots, slots: Tensor) -> None:
        """Count the pairs of checked slots [rows, k], at the end of the step at the latest."""

    def flush(self, counts: Sequence[Tensor]) -> None:
        """Add to ``counts``: by bank, [slots] int64 on the CPU. Memory of rows is given back."""

    def end(self, counts: Sequence[Tensor], reject: Reject) -> None:
        """``flush``, and raise what ``check`` has put off."""


class HostSlotUse:
    """``SlotUse`` on a CPU."""

    def __init__(self) -> None:
        self._uncounted: list[tuple[int, Tensor]] = []

    def begin(self, counts: Sequence[Tensor]) -> None:
        self.flush(counts)

    def check(
        self, filled: FilledSlots, ranks: Sequence[int], slots: Sequence[Tensor], reject: Reject
    ) -> UsedSlots:
        named = joined(slots)
        low, high = (int(x) for x in named.aminmax()) if named.numel() else (0, -1)
        is_inside = low >= -1 and high < filled.table.shape[0] - 1
        if not is_inside or (filled.has_free and not filled.table[named].all()):
            filled.blame(ranks, slots, reject)
        return UsedSlots(named, all_here=low >= 0, any_here=high >= 0)

    def count(self, filled: FilledSlots, slots: Tensor) -> None:
        self._uncounted.append((filled.bank, slots))

    def flush(self, counts: Sequence[Tensor]) -> None:
        """Then nobody waits, and a loop finds its code in the caches."""
        for bank, slots in self._uncounted:
            bins = torch.bincount(slots.flatten() + 1, minlength=counts[bank].shape[0] + 1)
            counts[bank].add_(bins[1:])  # the first is that of slot -1
        self._uncounted.clear()

    def end(self, counts: Sequence[Tensor], reject: Reject) -> None:
        self.flush(counts)


@dataclass(frozen=True, slots=True)
class _Seen:
    """The slots of an exchange as they were received."""

    filled: FilledSlots
    ranks: tuple[int, ...]
    slots: tuple[Tensor, ...]
    is_wrong: Tensor
    """[] bool: one of them has no expert."""


@dataclass(slots=True)
class SlotNotes:
    """What a step has noted on the device."""

    seen: list[_Seen] = field(default_factory=list)
    bins: dict[int, Tensor] = field(default_factory=dict)
    """By bank: pairs of slot -1 and of each slot, [slots + 1] int64."""

    def packed(self) -> Tensor:
        """Whether each of ``seen`` is wrong, and all bins, one after the other: int64."""
        return torch.cat([torch.stack([s.is_wrong for s in self.seen]).long(), *self.bins.values()])


class DeviceSlotUse:
    """``SlotUse`` on a GPU."""

    def __init__(self) -> None:
        self.notes = SlotNotes()
        """Of the step under way; those of a captured step are filled anew by each replay."""
        self._copied: Tensor | None = None

    def begin(self, counts: Sequence[Tensor]) -> None:
        """What a broken step has computed is not counted."""
        self.notes, self._copied = SlotNotes(), None

    def copy(self) -> None:
        """Begin to copy the notes to the host: ``end`` need not wait, if the host has by then."""
        self._copied = to_host_later(self.notes.packed())

    def check(
        self, filled: FilledSlots, ranks: Sequence[int], slots: Sequence[Tensor], reject: Reject
    ) -> UsedSlots:
        named = joined(slots)
        num_slots = filled.table.shape[0] - 1
        is_inside = (named >= -1) & (named < num_slots)
        places = torch.where(is_inside, named, -1)
        is_right = is_inside & filled.table[places.where(places >= 0, num_slots)]
        self.notes.seen.append(_Seen(filled, tuple(ranks), tuple(slots), ~is_right.all()))
        return UsedSlots(places.where(is_right, -1), all_here=False, any_here=named.numel() > 0)

    def count(self, filled: FilledSlots, slots: Tensor) -> None:
        flat = slots.flatten() + 1
        bins = self.notes.bins.get(filled.bank)
        if bins is None:
            bins = torch.zeros(filled.table.shape[0], dtype=torch.int64, device=slots.device)
            self.notes.bins[filled.bank] = bins
        bins.index_add_(0, flat, torch.ones_like(flat))

    def flush(self, counts: Sequence[Tensor]) -> None:
        """Nothing yet: counts stay on the device to the end of the step."""

    def end(self, counts: Sequence[Tensor], reject: Reject) -> None:
        notes, copied = self.notes, self._copied
        self.begin(counts)
        if not notes.seen:
            return
        numbers = to_host([notes.packed()])[0] if copied is None else copied.numpy()
        sizes = [len(notes.seen), *(len(own) for own in notes.bins.values())]
        is_wrong, *found = np.split(numbers, np.cumsum(sizes)[:-1])
        for bank, own in zip(notes.bins, found, strict=True):
            counts[bank][: len(own) - 1] += torch.from_numpy(own[1:].copy())
        for number in is_wrong.nonzero()[0].tolist():
            seen = notes.seen[number]
            seen.filled.blame(seen.ranks, seen.slots, reject)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts of all ranks, one under the other."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def slot_use(device: torch.device) -> SlotUse:
    """For experts on a device."""
    return HostSlotUse() if device.type == "cpu" else DeviceSlotUse()
