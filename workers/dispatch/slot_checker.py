"""Validates the expert slots in received rows, and counts the pairs of each slot.

On a CPU, slots are validated in the exchange; ``device_slots`` has the checker for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn, Protocol

import torch
from torch import Tensor

from cluster.core.placement import FREE_SLOT
from workers.dispatch.expert_counters import ExpertCounters, ReceivedRows

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

    def begin(self) -> None:
        """Begin a step, also after a failed step."""

    def check(
        self, filled: FilledSlots, ranks: Sequence[int], slots: Sequence[Tensor], reject: Reject
    ) -> UsedSlots:
        """Validate the slots [rows, k] that each of ``ranks`` sent, and concatenate them.

        ``reject`` is called for an invalid slot, either by this method or by ``end``.
        """

    def count(self, filled: FilledSlots, slots: Tensor, received: ReceivedRows) -> None:
        """Count an exchange, now or later in the step: the pairs of each slot in validated
        ``slots`` [rows, k], and on a GPU the padding of the ``received`` rows.

        ``flush`` or ``end`` adds the counts to the host's counters.
        """

    def flush(self) -> None:
        """Count the pairs that ``count`` has deferred, and free the memory of their rows.

        On a GPU, only ``end`` does this.
        """

    def end(self, reject: Reject) -> None:
        """End a step: add everything counted to the host's counters, and call ``reject`` for
        invalid slots that ``check`` has deferred."""


class HostSlotChecker:
    """``SlotChecker`` for experts on a CPU."""

    def __init__(self, counters: ExpertCounters) -> None:
        self._counters = counters
        self._uncounted: list[tuple[int, Tensor]] = []

    def begin(self) -> None:
        self.flush()

    def check(
        self, filled: FilledSlots, ranks: Sequence[int], slots: Sequence[Tensor], reject: Reject
    ) -> UsedSlots:
        named = joined(slots).long()
        low, high = (int(x) for x in named.aminmax()) if named.numel() else (0, -1)
        is_inside = low >= -1 and high < filled.table.shape[0] - 1
        if not is_inside or (filled.has_free and not filled.table[named].all()):
            filled.reject_invalid_slots(ranks, slots, reject)
        return UsedSlots(named, all_here=low >= 0, any_here=high >= 0)

    def count(self, filled: FilledSlots, slots: Tensor, received: ReceivedRows) -> None:
        self._uncounted.append((filled.bank, slots))

    def flush(self) -> None:
        """Add the pairs of all slots that ``count`` has deferred to the counters, in one loop.

        Call it after outputs are sent, when no attention rank waits for this rank.
        """
        for bank, slots in self._uncounted:
            counts = self._counters.token_counts[bank]
            bins = torch.bincount(slots.flatten() + 1, minlength=counts.shape[0] + 1)
            counts.add_(bins[1:])  # the first bin is for slot -1
        self._uncounted.clear()

    def end(self, reject: Reject) -> None:
        self.flush()


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate the tensors of all ranks, without a copy if they are adjacent in memory."""
    merged = merge_adjacent(parts)
    return merged[0] if len(merged) == 1 else torch.cat(list(parts))


def merge_adjacent(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return one view of all rows if the tensors of all ranks follow each other in one storage,
    else ``parts``."""
    first = parts[0]
    strides, place = first.stride(), first.storage_offset()
    memory = first.untyped_storage()._cdata  # also of simulated tensors, without an address
    for part in parts:
        is_next = part.storage_offset() == place and part.stride() == strides
        if not is_next or part.untyped_storage()._cdata != memory:
            return parts
        place += part.shape[0] * strides[0]
    num_rows = sum(part.shape[0] for part in parts)
    return (first.as_strided((num_rows, *first.shape[1:]), strides, first.storage_offset()),)
