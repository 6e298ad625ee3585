"""Maps the experts of each row to ranks and expert slots, by the placement of a step's epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cluster.config.cluster import CombineMode
from cluster.core.group_placement import bank_of, serves
from cluster.core.placement import BankPlacement, ExpertPlacement
from cluster.core.topology import Generation, StepGroup
from workers.dispatch.copies import ChosenCopies, CopyTables, EpochTables
from workers.dispatch.dispatcher import BatchRows
from workers.dispatch.recording import FixedTables
from workers.model.layers import Dispatch
from workers.native.exchange import sent_slots
from workers.native.library import Library
from workers.requests.step_header import StepHeader


class _Maps(NamedTuple):
    """Maps of one placement epoch."""

    ranks: tuple[int, ...]
    tables: Sequence[CopyTables]


class ExpertMaps:
    """Selects the rank and the expert slot for each pair of a row and an expert."""

    def __init__(
        self, combine_mode: CombineMode, device: torch.device, library: Library | None
    ) -> None:
        """``library``: compiled code that replaces torch if no row has a choice of expert copies.

        None: always use torch.
        """
        self._configured_mode = combine_mode
        self._device = device
        self._library = library
        self.combine_mode = combine_mode
        """Combine mode of the current generation: ``per_slot`` (one output for each row and expert)
        or ``sum`` (one partial sum for each row)."""
        self.ranks: tuple[int, ...] = ()
        """The expert ranks that take part in the exchanges of the current step, ascending."""
        self._epochs = EpochTables[_Maps]()
        self._built: dict[int, tuple[BankPlacement, Mapping[int, int], StepGroup, CopyTables]] = {}
        self._tables: Sequence[CopyTables] = ()
        self._fixed = FixedTables()
        self._decode_slots: Sequence[Tensor] = ()
        self._micro_batches: Sequence[BatchRows] = ()
        self._has_prompts = False
        self._is_row: Tensor | None = None

    def set_placement(
        self, placement: ExpertPlacement, generation: Generation, group: StepGroup = ""
    ) -> None:
        """Add the maps of a placement's epoch, and drop the maps of earlier generations.

        ``group``: step group that uses the maps. Raises ``ProtocolError`` if the placement
        uses a device that no expert worker of the generation has.
        """
        own = [m for m in generation.experts if serves(placement, m.device, group)]
        device_index = {m.device: i for i, m in enumerate(own)}
        tables = [self._table(i, b, device_index, group) for i, b in enumerate(placement.banks)]
        self.ranks = tuple(m.rank for m in own)
        self.combine_mode = "per_slot" if generation.returns_slots else self._configured_mode
        self._epochs.add(generation.number, placement.epoch, _Maps(self.ranks, tables))

    def _table(
        self, index: int, bank: BankPlacement, device_index: Mapping[int, int], group: StepGroup
    ) -> CopyTables:
        """Return the tables of a bank; reuse the previous ones if placement and ranks are equal."""
        known = self._built.get(index)
        if known is None or known[:3] != (bank, device_index, group):
            tables = CopyTables.build(bank_of(bank, group), device_index, self._device)
            known = self._built[index] = bank, device_index, group, tables
        return known[3]

    def begin_step(
        self,
        header: StepHeader,
        micro_batches: Sequence[BatchRows],
        is_row: Tensor | None = None,
    ) -> None:
        """Begin a step: use the maps of its epoch. Raises ``ProtocolError`` for an unknown epoch.

        micro_batches: the rows of each micro-batch, read only in a step with prompts. is_row
        [micro-batches, T] int64, in a captured step only: 0 for a row without a request, which gets
        no slots.
        """
        self.ranks, self._tables = self._epochs.begin_step(header)
        self._micro_batches, self._is_row = micro_batches, is_row
        self._has_prompts = header.exact or header.prefill_rows > 0
        self._decode_slots = [own.decode_slots for own in self._tables]
        if self._device.type == "cuda":  # captured steps read them at one address
            self._decode_slots = self._fixed.copy_in(self._decode_slots)

    def forget(self, oldest_epoch: int) -> None:
        """Drop the maps of epochs before ``oldest_epoch``."""
        self._epochs.forget(oldest_epoch)

    @property
    def version(self) -> int:
        """A number that changes when the memory of ``decode_slots`` is reallocated on a GPU."""
        return self._fixed.version

    @property
    def decode_slots(self) -> Sequence[Tensor]:
        """Slots that serve decode rows in the current step's epoch: for each bank, [ranks, experts]
        int32, -1 if another rank serves the expert."""
        return self._decode_slots

    def choose(
        self, sent: Dispatch, micro_batch: int, *, with_weights: bool
    ) -> tuple[Tensor, ChosenCopies | None]:
        """Return the slots of a micro-batch's experts, [ranks, T, k] int32, and the chosen copies.

        A slot is -1 if another rank serves the expert. With ``with_weights``, the first result is
        [ranks, T, 2k]: the bits of the float32 routing weights follow the slots. The chosen copies
        are None if all rows use the decode copies, as in steps without prompts.
        """
        tables, decode_slots = self._tables[sent.bank], self._decode_slots[sent.bank]
        weights = sent.topk_weights if with_weights else None
        has_choice = self._has_prompts and tables.has_choice
        if self._library is not None and not has_choice:
            return sent_slots(self._library, decode_slots, sent.topk_ids, weights), None
        is_row = None if self._is_row is None else self._is_row[micro_batch]
        if self._device.type == "cuda" and not has_choice:
            from workers.cuda.slots import slots_by_rank  # late: needs Triton

            return slots_by_rank(decode_slots, sent.topk_ids, weights, is_row), None
        copies = None
        if has_choice:
            batch = self._micro_batches[micro_batch]
            slots, copies = tables.choose(sent.topk_ids, batch.is_prefill, batch.row_key)
        else:
            slots = decode_slots[:, sent.topk_ids]
        if is_row is not None:
            slots = slots.where(is_row.unsqueeze(1) != 0, -1)
        if weights is not None:
            bits = weights.float().contiguous().view(torch.int32)
            slots = torch.cat((slots, bits.expand(slots.shape)), dim=2)
        return slots, copies
