"""Validates the expert slots in received rows, and counts the pairs of each slot.

On a CPU, slots are validated in the exchange. On a GPU the host would have to wait in every
exchange. So the device replaces an invalid slot by -1, and one copy at the end of the step brings
the validity and the counts to the host, which then rejects the rank that sent the slot.
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
"""Function that closes the edge to a rank which sent invalid data: (rank, reason). It always raises
``PeerLostError``."""


@dataclass(frozen=True, slots=True)
class FilledSlots:
    """Slots of one bank that hold an expert in an epoch."""

    bank: int
    """Index of the bank, ``BankSpec.index``."""
    table: Tensor
    """Whether each slot holds an expert, [slots + 1] bool. The last entry, for slot -1 (a pair of
    another rank), is True."""
    has_free: bool

    @classmethod
    def of(cls, bank: int, experts: Sequence[int], device: torch.device) -> FilledSlots:
        """Create the table of a bank. ``experts``: the expert in each slot, or ``FREE_SLOT``."""
        filled = [expert != FREE_SLOT for expert in experts]
        return cls(bank, torch.tensor([*filled, True], device=device), FREE_SLOT in experts)

    def reject_invalid_slots(
        self, ranks: Sequence[int], slots: Sequence[Tensor], reject: Reject
    ) -> None:
        """Call ``reject`` for a rank that sent an unknown or empty slot.

        slots: for each of ``ranks``, the sent slots [rows, k]; -1 for experts of another rank.
        """
        filled = self.table.tolist()[:-1]
        for rank, mine in zip(ranks, slots, strict=True):
            for slot in mine.flatten().tolist():
                if slot != -1 and not (0 <= slot < len(filled) and filled[slot]):
                    reject(rank, f"no expert in slot {slot} of bank {self.bank}")


@dataclass(frozen=True, slots=True)
class UsedSlots:
    """Validated expert slots of the rows of one exchange."""

    slots: Tensor
    """Expert slots of each row on this rank, [rows, k] int64; -1 for experts of another rank."""
    all_here: bool
    """True only if certainly all (row, slot) pairs belong to this rank."""
    any_here: bool
    """False only if certainly no (row, slot) pair belongs to this rank."""


class SlotChecker(Protocol):
    """Validates the expert slots of received rows, and counts the pairs of each slot."""

    def begin(self, counts: Sequence[Tensor]) -> None:
        """Begin a step, also after a failed step.

        ``counts``: counters of the pairs of each slot, by bank [slots] int64 on the CPU.
        """

    def check(
        self, filled: FilledSlots, ranks: Sequence[int], slots: Sequence[Tensor], reject: Reject
    ) -> UsedSlots:
        """Validate the slots [rows, k] int64 that each of ``ranks`` sent, and concatenate them.

        ``reject`` is called for an invalid slot, either by this method or by ``end``.
        """

    def count(self, filled: FilledSlots, slots: Tensor) -> None:
        """Count the pairs of each slot in validated ``slots`` [rows, k], now or later in the step.

        ``flush`` or ``end`` adds them to the host's counters.
        """

    def flush(self, counts: Sequence[Tensor]) -> None:
        """Count the pairs that ``count`` has deferred, and free the memory of their rows.

        ``counts``: counters to which to add, by bank [slots] int64 on the CPU. On a GPU, only
        ``end`` adds to them.
        """

    def end(self, counts: Sequence[Tensor], reject: Reject) -> None:
        """End a step: add all counted pairs to ``counts``, and call ``reject`` for invalid slots
        that ``check`` has deferred."""


class HostSlotChecker:
    """``SlotChecker`` for experts on a CPU."""

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
            filled.reject_invalid_slots(ranks, slots, reject)
        return UsedSlots(named, all_here=low >= 0, any_here=high >= 0)

    def count(self, filled: FilledSlots, slots: Tensor) -> None:
        self._uncounted.append((filled.bank, slots))

    def flush(self, counts: Sequence[Tensor]) -> None:
        """Add the pairs of all slots that ``count`` has deferred to ``counts``, in one loop.

        Call it after outputs are sent, when no attention rank waits for this rank.
        """
        for bank, slots in self._uncounted:
            bins = torch.bincount(slots.flatten() + 1, minlength=counts[bank].shape[0] + 1)
            counts[bank].add_(bins[1:])  # the first bin is for slot -1
        self._uncounted.clear()

    def end(self, counts: Sequence[Tensor], reject: Reject) -> None:
        self.flush(counts)


@dataclass(frozen=True, slots=True)
class _Seen:
    """The received slots of an exchange, with the device's result of their validation."""

    filled: FilledSlots
    ranks: tuple[int, ...]
    slots: tuple[Tensor, ...]
    is_wrong: Tensor
    """Whether any received slot has no expert, [] bool on the device."""


@dataclass(slots=True)
class SlotNotes:
    """Validity and pair counts of the slots received in one step, on the device."""

    seen: list[_Seen] = field(default_factory=list)
    bins: dict[int, Tensor] = field(default_factory=dict)
    """For each bank, the number of pairs of slot -1 (an expert of another rank), then of each slot:
    [slots + 1] int64."""

    def packed(self) -> Tensor:
        """Return ``is_wrong`` of each entry of ``seen``, then all ``bins``, as one int64 tensor."""
        return torch.cat([torch.stack([s.is_wrong for s in self.seen]).long(), *self.bins.values()])


class DeviceSlotChecker:
    """``SlotChecker`` for experts on a GPU."""

    def __init__(self) -> None:
        self.notes = SlotNotes()
        """Validity and counts of the current step. Each replay of a captured step refills the notes
        that were made at its capture."""
        self._copied: Tensor | None = None

    def begin(self, counts: Sequence[Tensor]) -> None:
        """Begin a step: drop ``notes`` of an earlier step that failed. ``counts`` stay the same."""
        self.notes, self._copied = SlotNotes(), None

    def copy(self) -> None:
        """Start to copy ``notes`` to the host, so that ``end`` need not wait for the device."""
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
        """Do nothing: counts stay on the device until the end of the step."""

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
            seen.filled.reject_invalid_slots(seen.ranks, seen.slots, reject)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate the tensors of all ranks; a single tensor is returned as is."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def make_slot_checker(device: torch.device) -> SlotChecker:
    """Create the ``SlotChecker`` for experts on a device."""
    return HostSlotChecker() if device.type == "cpu" else DeviceSlotChecker()
