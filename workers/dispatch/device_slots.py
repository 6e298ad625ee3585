"""Validates and counts the expert slots in received rows on a GPU.

The host would have to wait for the device in every exchange. So a kernel replaces an invalid slot
by -1, and one copy at the end of the step brings the validity and the counts to the host, which
then rejects the rank that sent the slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.dispatch.expert_counters import ExpertCounters, ReceivedRows
from workers.dispatch.slot_checker import (
    FilledSlots,
    HostSlotChecker,
    Reject,
    SlotChecker,
    UsedSlots,
    merge_adjacent,
)
from workers.model.config import BankSpec
from workers.model.host_copies import to_host, to_host_later
from workers.requests.step_header import MAX_MICRO_BATCHES

_NUM_FLAGS = 3
"""Numbers in ``flags`` of ``check_slots``."""


class _Seen(NamedTuple):
    """The received slots of an exchange."""

    filled: FilledSlots
    ranks: tuple[int, ...]
    slots: tuple[Tensor, ...]


@dataclass
class SlotNotes:
    """Validity and counts of the slots received in one step, on the device."""

    numbers: Tensor
    """Three flags of each exchange in order (``check_slots``), then the pairs of each slot, bank
    after bank: int64."""
    first_bins: int
    """Index in ``numbers`` at which the pairs of the slots begin."""
    sizes: tuple[int, ...]
    """Number of slots of each bank."""
    seen: list[_Seen] = field(default_factory=list)
    received: list[ReceivedRows] = field(default_factory=list)

    @cached_property
    def facts(self) -> NDArray[np.int64]:
        """Fields of each entry in ``received``, once it is complete: [4, exchanges]."""
        rows = [(r.exchange.per_slot_input, *r[1:]) for r in self.received]
        return np.array(rows, dtype=np.int64).T


class DeviceSlotChecker:
    """``SlotChecker`` for experts on a GPU."""

    def __init__(
        self, counters: ExpertCounters, banks: Sequence[BankSpec], device: torch.device
    ) -> None:
        self._counters = counters
        self._device = device
        self._max_exchanges = MAX_MICRO_BATCHES * sum(len(bank.exchanges) for bank in banks)
        self.notes: SlotNotes | None = None
        """Validity and counts of the current step; None before its first exchange. Each replay of a
        captured step refills the notes that were made at its capture."""
        self._copied: Tensor | None = None

    def begin(self) -> None:
        """Begin a step: drop ``notes`` of an earlier step that failed."""
        self.notes = self._copied = None

    def copy(self) -> None:
        """Start to copy ``notes`` to the host, so that ``end`` need not wait for the device."""
        assert self.notes is not None, "a step was replayed"
        self._copied = to_host_later(self.notes.numbers)

    def check(
        self, filled: FilledSlots, ranks: Sequence[int], slots: Sequence[Tensor], reject: Reject
    ) -> UsedSlots:
        from workers.cuda.slots import check_slots  # late: needs Triton

        notes = self.notes = self.notes or self._new_notes()
        flags = notes.numbers[_NUM_FLAGS * len(notes.seen) :]
        bins = notes.numbers[notes.first_bins + sum(notes.sizes[: filled.bank]) :]
        notes.seen.append(_Seen(filled, tuple(ranks), tuple(slots)))
        num_rows = sum(len(part) for part in slots)
        checked = torch.empty(num_rows, slots[0].shape[1], dtype=torch.int64, device=self._device)
        first = 0
        for part in merge_adjacent(slots):
            check_slots(part, filled.table, checked[first:], bins, flags)
            first += len(part)
        return UsedSlots(checked, all_here=False, any_here=num_rows > 0)

    def count(self, filled: FilledSlots, slots: Tensor, received: ReceivedRows) -> None:
        """Note the ``received`` rows; ``check`` has counted the slots."""
        assert self.notes is not None, "check was not called"
        self.notes.received.append(received)

    def flush(self) -> None:
        """Do nothing: counts stay on the device until the end of the step."""

    def end(self, reject: Reject) -> None:
        notes, copied = self.notes, self._copied
        self.begin()
        if notes is None:
            return
        numbers = to_host([notes.numbers])[0] if copied is None else copied.numpy()
        self._add_pairs(notes, torch.from_numpy(numbers[notes.first_bins :].copy()))
        flags = numbers[: _NUM_FLAGS * len(notes.seen)].reshape(-1, _NUM_FLAGS).T
        self._add_padding(notes, *flags[1:, : len(notes.received)])
        for number in flags[0].nonzero()[0].tolist():
            seen = notes.seen[number]
            seen.filled.reject_invalid_slots(seen.ranks, seen.slots, reject)

    def _new_notes(self) -> SlotNotes:
        sizes = tuple(map(len, self._counters.token_counts))
        first_bins = _NUM_FLAGS * self._max_exchanges
        numbers = torch.zeros(first_bins + sum(sizes), dtype=torch.int64, device=self._device)
        return SlotNotes(numbers, first_bins, sizes)

    def _add_pairs(self, notes: SlotNotes, pairs: Tensor) -> None:
        counters = self._counters
        if len(pairs) == len(counters.all_token_counts):
            counters.all_token_counts += pairs
            return
        # The step was captured before slots were added.
        for counts, own in zip(
            counters.token_counts, torch.split(pairs, list(notes.sizes)), strict=True
        ):
            counts[: len(own)] += own

    def _add_padding(
        self, notes: SlotNotes, rows_here: NDArray[np.int64], pairs: NDArray[np.int64]
    ) -> None:
        """Count the padding of all exchanges at once; see ``ExpertCounters.add_padding``.

        A step that has only padding is not counted.
        """
        if not rows_here.any():
            return
        per_slot_input, num_inputs, num_rows, by_pair = notes.facts
        padding = self._counters.padding
        used = np.where(per_slot_input, pairs, rows_here).sum()
        padding.add("dispatch", int(num_inputs.sum()), int(used))
        sent, used = np.where(by_pair, pairs, num_rows), np.where(by_pair, pairs, rows_here)
        padding.add("combine", int(sent.sum()), int(used.sum()))


def make_slot_checker(
    counters: ExpertCounters, banks: Sequence[BankSpec], device: torch.device
) -> SlotChecker:
    """Create the ``SlotChecker`` for experts on a device."""
    if device.type == "cpu":
        return HostSlotChecker(counters)
    return DeviceSlotChecker(counters, banks, device)
