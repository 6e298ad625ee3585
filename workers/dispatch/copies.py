"""Chooses the copy of an expert that serves a row, by lookup tables of the placement.

The decode table of a placement epoch names one copy of each expert, which serves all decode rows.
Prefill rows are distributed over all copies in proportion to the placement's split weights: a fixed
integer hash of (row, expert) selects the copy, so that a row has the same copy after a retry and on
every platform.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from cluster.core.errors import ProtocolError
from cluster.core.placement import BankPlacement
from workers.requests.step_header import StepHeader

Tables = TypeVar("Tables")

_SCALE = 1 << 32
"""Number of values of a 32-bit hash; a split weight of 1.0 corresponds to this number."""


_MUL_1 = 0xBF58476D1CE4E5B9 - (1 << 64)  # int64 with the same bits as the uint64 constant
_MUL_2 = 0x94D049BB133111EB - (1 << 64)
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)


def mix64(values: Tensor) -> Tensor:
    """Hash int64 values bijectively, with equal results on every device (arithmetic wraps).

    Source: the finaliser of splitmix64 (Steele, Lea, Flood 2014).
    """
    mixed = values + _STEP
    mixed = (mixed ^ _shift_right(mixed, 30)) * _MUL_1
    mixed = (mixed ^ _shift_right(mixed, 27)) * _MUL_2
    return mixed ^ _shift_right(mixed, 31)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    return (values >> bits) & ((1 << (64 - bits)) - 1)


class ChosenCopies(NamedTuple):
    """The expert copies that serve the (row, expert) pairs of prompt rows."""

    places: Tensor
    """Index of the chosen copy among the copies of each pair's expert, [T, k] int64."""
    num_copies: int
    """Maximum number of copies of one expert in the bank; all of ``places`` are less."""


@dataclass(frozen=True, slots=True)
class CopyTables:
    """Lookup tables of the copies of one bank's experts, in one placement epoch."""

    decode_slots: Tensor
    """Expert slot that serves an expert's decode rows, [ranks, experts] int32: a slot number for
    the expert rank with this slot, -1 for all other ranks."""
    copy_rank: Tensor
    """Index of each copy's rank in the list of expert ranks, [experts, copies] int32; -1 where an
    expert has fewer copies."""
    copy_slot: Tensor
    """Expert slot of each copy, [experts, copies] int32; -1 where an expert has fewer copies."""
    thresholds: Tensor
    """Exclusive upper ends of ranges of a 32-bit hash, [experts, copies] int64; the range that
    contains the hash of a prefill row and the expert selects the copy."""
    has_choice: bool
    """Whether prefill rows must choose among copies: not if the first copy of each expert serves
    all rows."""

    @classmethod
    def build(
        cls, bank: BankPlacement, device_index: Mapping[int, int], device: torch.device
    ) -> CopyTables:
        """Build the tables of ``bank`` on ``device``.

        ``device_index``: index in the list of expert ranks by device number of the placement.

        Raises ``ProtocolError`` if a device with a copy that serves rows is not among the ranks.
        """
        copies = [bank.logical_to_physical(e) for e in range(bank.num_experts)]
        used = {d for c in copies for d, s in c if bank.split[d][s] > 0}
        missing = used.union(bank.decode_device) - set(device_index)
        if missing:
            raise ProtocolError(
                f"placement of bank {bank.bank} layer {bank.layer} uses device {min(missing)}, "
                "which no member of the generation has"
            )
        width = max(len(c) for c in copies)
        decode = torch.full((len(device_index), bank.num_experts), -1, dtype=torch.int32)
        rank = torch.full((bank.num_experts, width), -1, dtype=torch.int32)
        slot = torch.full((bank.num_experts, width), -1, dtype=torch.int32)
        ends = torch.full((bank.num_experts, width), _SCALE, dtype=torch.int64)
        has_choice = False
        for expert, places in enumerate(copies):
            total = 0.0
            used_copies = [i for i, (at, s) in enumerate(places) if bank.split[at][s] > 0]
            for i, (at, s) in enumerate(places):
                total += bank.split[at][s]
                rank[expert, i] = device_index.get(at, -1)
                slot[expert, i] = s
                ends[expert, i] = round(total * _SCALE) if i < used_copies[-1] else _SCALE
                if at == bank.decode_device[expert]:
                    decode[device_index[at], expert] = s
            # Without a choice, all rows use the decode copy, and count as rows of copy 0.
            has_choice |= used_copies != [0] or places[0][0] != bank.decode_device[expert]
        return cls(
            decode_slots=decode.to(device),
            copy_rank=rank.to(device),
            copy_slot=slot.to(device),
            thresholds=ends.to(device),
            has_choice=has_choice,
        )

    def choose(
        self, topk_ids: Tensor, is_prefill: Tensor, row_key: Tensor
    ) -> tuple[Tensor, ChosenCopies]:
        """Choose the copies that serve a batch's (row, expert) pairs; return their slots and the
        choices.

        topk_ids [T, k] int64, is_prefill [T] bool, row_key [T] int64 (hash of each row's identity).
        The slots are [ranks, T, k] int32, -1 if another rank serves the pair. The choices are valid
        for prefill rows only. Without ``has_choice``, or if no row is a prefill row,
        ``decode_slots[:, topk_ids]`` gives the same slots faster.
        """
        fixed = self.decode_slots[:, topk_ids]
        share = mix64(row_key.unsqueeze(1) + topk_ids * _STEP) & (_SCALE - 1)
        copy = (share.unsqueeze(2) >= self.thresholds[topk_ids]).sum(2)
        rank = self.copy_rank[topk_ids, copy]
        slot = self.copy_slot[topk_ids, copy]
        ranks = torch.arange(len(fixed), dtype=torch.int32, device=fixed.device)
        chosen = torch.where(rank == ranks.view(-1, 1, 1), slot, -1)
        slots = torch.where(is_prefill.view(1, -1, 1), chosen, fixed)
        return slots, ChosenCopies(copy, self.copy_rank.shape[1])


class EpochTables(Generic[Tables]):
    """Lookup tables of one generation, by placement epoch (version of the expert placement)."""

    def __init__(self) -> None:
        self._generation: int | None = None
        self._by_epoch: dict[int, Tables] = {}

    def add(self, generation: int, epoch: int, tables: Tables) -> None:
        """Add the tables of a placement epoch, and drop the tables of other generations."""
        if generation != self._generation:
            self._by_epoch.clear()
        self._generation = generation
        self._by_epoch[epoch] = tables

    def begin_step(self, header: StepHeader) -> Tables:
        """Return the tables of a step's epoch; drop tables of epochs before ``oldest_epoch``.

        Raises ``ProtocolError`` if no tables were added for the step's epoch.
        """
        tables = self._by_epoch.get(header.epoch)
        if tables is None:
            known = sorted(self._by_epoch)
            raise ProtocolError(
                f"step {header.step} runs in epoch {header.epoch}, known are {known}"
            )
        self.forget(header.oldest_epoch)
        return tables

    def forget(self, oldest_epoch: int) -> None:
        """Drop the tables of epochs before ``oldest_epoch``."""
        for epoch in [e for e in self._by_epoch if e < oldest_epoch]:
            del self._by_epoch[epoch]
