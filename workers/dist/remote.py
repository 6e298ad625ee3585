"""The home side of dispatch and combine, over any transport.

What goes to an expert rank, part by part:

    static split    slots [n, k] for all n granted rows (-1: not here), the rows as they are
    exact split     the same for the rows that have an expert there, counts first

and what comes back: in ``sum`` mode one float32 partial sum per row sent, else one output per
(row, slot) pair in row-major order. In ``sum`` mode the weights travel beside the slots, as the
bits of float32 in the same int32 part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.config import CombineMode
from cluster.errors import ProtocolError
from cluster.placement import BankPlacement, ExpertPlacement
from cluster.topology import Generation
from workers.dist.activity import Activity
from workers.dist.copies import CopyTables
from workers.dist.dispatcher import BatchRows, DispatchHandle
from workers.dist.header import StepHeader
from workers.dist.transport import DataTransport, Expected, Message, Part, Tag
from workers.dist.weighting import weighted_sum
from workers.families.base import BankSpec, ExchangeSpec


@dataclass(frozen=True, slots=True)
class Sent:
    """What went to one expert rank, and so what comes back."""

    rank: int
    """Expert rank."""
    places: Tensor | None
    """Where the returned rows belong: rows [n] in ``sum`` mode, else pairs [P] in row-major order
    of [T, k]; None when they are all of them, in order."""
    count: int
    """Rows that come back."""


@dataclass(frozen=True, slots=True)
class RemoteHandle(DispatchHandle):
    """A dispatch under way."""

    sent: tuple[Sent, ...]
    """By expert rank; ranks from which nothing comes back are left out."""
    topk_ids: Tensor
    """[T, k] int64 as dispatched."""
    topk_weights: Tensor
    """[T, k] as dispatched."""


class RemoteDispatcher:
    """``TokenDispatcher`` of one attention rank. Data thread only."""

    def __init__(
        self,
        transport: DataTransport,
        banks: Sequence[BankSpec],
        *,
        rank: int,
        combine_mode: CombineMode,
        dtype: torch.dtype,
        device: torch.device,
        activity: Activity | None = None,
    ) -> None:
        self._transport = transport
        self._activity = activity or Activity()
        self._banks = tuple(banks)
        self._rank = rank
        self._combine_mode = combine_mode
        self._dtype = dtype
        self._device = device
        self._ranks: tuple[int, ...] = ()
        self._generation = 0
        self._epochs: dict[int, list[CopyTables]] = {}
        self._built: dict[int, tuple[BankPlacement, CopyTables]] = {}
        self._tables: list[CopyTables] = []
        self._header: StepHeader | None = None
        self._micro_batches: Sequence[BatchRows] = ()

    def set_placement(self, placement: ExpertPlacement, generation: Generation) -> None:
        """Take the maps of an epoch; those of an earlier generation are forgotten.

        Raises ``ProtocolError`` when the maps use a device that no member has.
        """
        members = generation.experts
        device_index = {m.device: i for i, m in enumerate(members)}
        if generation.number != self._generation:
            self._epochs.clear()
            self._built.clear()
        tables = [self._table(i, b, device_index) for i, b in enumerate(placement.banks)]
        self._generation = generation.number
        self._ranks = tuple(m.rank for m in members)
        self._epochs[placement.epoch] = tables

    def _table(
        self, index: int, bank: BankPlacement, device_index: Mapping[int, int]
    ) -> CopyTables:
        """The bank's tables: those of the epoch before where its maps are the same."""
        known = self._built.get(index)
        if known is None or known[0] != bank:
            known = self._built[index] = bank, CopyTables.build(bank, device_index, self._device)
        return known[1]

    def begin_step(self, header: StepHeader, micro_batches: Sequence[BatchRows]) -> None:
        """See ``TokenDispatcher``. Raises ``ProtocolError`` for an epoch that is not known."""
        tables = self._epochs.get(header.epoch)
        if tables is None:
            raise ProtocolError(
                f"step {header.step} runs in epoch {header.epoch}, known are {sorted(self._epochs)}"
            )
        self._forget(header.oldest_epoch)
        self._tables = tables
        self._header = header
        self._micro_batches = micro_batches
        self._transport.begin_step(header)

    def sit_out(self, header: StepHeader) -> None:
        """Forget old maps; an attention rank without rows has no part in the exchanges."""
        self._forget(header.oldest_epoch)

    def _forget(self, oldest_epoch: int) -> None:
        for epoch in [e for e in self._epochs if e < oldest_epoch]:
            del self._epochs[epoch]

    def dispatch(
        self,
        rows: Tensor,
        topk_ids: Tensor,
        topk_weights: Tensor,
        bank: int,
        exchange: int = 0,
        micro_batch: int = 0,
    ) -> RemoteHandle:
        """See ``TokenDispatcher``; sends at once."""
        assert self._header is not None, "begin_step comes first"
        spec = self._banks[bank]
        granted = self._header.rows(self._rank, micro_batch)
        num_rows = len(topk_ids)
        assert num_rows <= granted, f"{num_rows} rows, {granted} granted"
        tag = Tag(bank, exchange, micro_batch, "rows")
        sent: tuple[Sent, ...] = ()
        copies: Tensor | None = None
        if granted:
            batch = self._micro_batches[micro_batch]
            chosen = self._tables[bank].choose(
                topk_ids, batch.is_prefill, batch.row_key, spread=self._header.exact
            )
            slots, copies = chosen.slots, chosen.copies
            by_pair = self._by_pair(spec.exchanges[exchange])
            meta = slots if by_pair else _with_weights(slots, topk_weights)
            pick = self._pick_exact if self._header.exact else self._pick_static
            messages, sent = pick(slots, meta, rows, spec.exchanges[exchange], granted)
            self._transport.post(tag, messages, sized=self._header.exact)
        return RemoteHandle(
            bank=spec,
            exchange=exchange,
            micro_batch=micro_batch,
            num_rows=num_rows,
            copies=copies,
            sent=sent,
            topk_ids=topk_ids,
            topk_weights=topk_weights,
        )

    def combine(self, handle: DispatchHandle) -> Tensor:
        """See ``TokenDispatcher``; waits for the outputs."""
        assert isinstance(handle, RemoteHandle)
        exchange = handle.bank.exchanges[handle.exchange]
        by_pair = self._by_pair(exchange)
        part = Part(exchange.out_width, self._dtype if by_pair else torch.float32)
        tag = Tag(handle.bank.index, handle.exchange, handle.micro_batch, "outputs")
        expected = [Expected(s.rank, (part,), (s.count,)) for s in handle.sent]
        with self._activity:
            received = [parts[0] for parts in self._transport.receive(tag, expected, sized=False)]
        if not by_pair:
            return self._add_partial_sums(handle, received, exchange.out_width)
        pairs = self._gather_pairs(handle, received, exchange.out_width)
        if not exchange.weighted:
            return pairs.view(handle.num_rows, handle.bank.top_k, exchange.out_width)
        return self._weigh(handle, pairs)

    def _by_pair(self, exchange: ExchangeSpec) -> bool:
        """Whether an output comes home for every pair, not a sum for every row."""
        return self._combine_mode == "per_slot" or not exchange.weighted

    # Dispatch: what goes to which rank.

    def _pick_static(
        self, slots: Tensor, meta: Tensor, rows: Tensor, exchange: ExchangeSpec, granted: int
    ) -> tuple[list[Message], tuple[Sent, ...]]:
        """Every granted row to every rank: no sizes, and next to nothing to compute."""
        missing = granted - slots.shape[1]
        if exchange.per_slot_input:
            rows = rows.flatten(0, 1)
        if missing:  # a request ended between the proposal and the header
            meta = F.pad(meta, (0, 0, 0, missing), value=-1)
            inputs = slots.shape[2] if exchange.per_slot_input else 1
            rows = F.pad(rows, (0, 0, 0, missing * inputs))
        messages = [Message(r, (meta[i], rows)) for i, r in enumerate(self._ranks)]
        if not self._by_pair(exchange):
            return messages, tuple(Sent(rank, None, granted) for rank in self._ranks)
        return messages, self._sent_pairs(slots)

    def _pick_exact(
        self, slots: Tensor, meta: Tensor, rows: Tensor, exchange: ExchangeSpec, granted: int
    ) -> tuple[list[Message], tuple[Sent, ...]]:
        """To each rank the rows that have an expert there, each row once."""
        here = (slots >= 0).any(2)
        pairs = {s.rank: s for s in self._sent_pairs(slots)}
        messages, sent_rows = [], []
        for i, rank in enumerate(self._ranks):
            places = here[i].nonzero().squeeze(1)  # device-to-host sync
            count = len(places)
            is_all = count == len(here[i])
            part = meta[i] if is_all else meta[i][places]
            if exchange.per_slot_input:
                found = pairs.get(rank)
                flat = rows.flatten(0, 1)
                if found is None:
                    inputs = flat[:0]
                else:
                    inputs = flat if found.places is None else flat[found.places]
            else:
                inputs = rows if is_all else rows[places]
            messages.append(Message(rank, (part, inputs)))
            if count:
                sent_rows.append(Sent(rank, None if is_all else places, count))
        return messages, tuple(pairs.values() if self._by_pair(exchange) else sent_rows)

    def _sent_pairs(self, slots: Tensor) -> tuple[Sent, ...]:
        """By rank the pairs [T * k] that are computed there; ranks without any are left out."""
        sent = []
        for rank, mine in zip(self._ranks, slots, strict=True):
            places = (mine.flatten() >= 0).nonzero().squeeze(1)  # device-to-host sync
            count = len(places)
            if count:
                sent.append(Sent(rank, None if count == mine.numel() else places, count))
        return tuple(sent)

    # Combine: from what came back to the result.

    def _add_partial_sums(
        self, handle: RemoteHandle, received: Sequence[Tensor], width: int
    ) -> Tensor:
        """Add in rank order in float32, round once."""
        total: Tensor | None = None
        for sent, part in zip(handle.sent, received, strict=True):
            if sent.places is None and total is None:
                total = part[: handle.num_rows]
                continue
            if total is None:
                total = torch.zeros(handle.num_rows, width, device=self._device)
            if sent.places is None:
                total += part[: handle.num_rows]
            else:
                total.index_add_(0, sent.places, part)
        if total is None:
            total = torch.zeros(handle.num_rows, width, device=self._device)
        return total.to(self._dtype)

    def _gather_pairs(self, handle: RemoteHandle, received: Sequence[Tensor], width: int) -> Tensor:
        """Outputs of all pairs in row-major order [T * k, width], zeros where there is none."""
        if len(received) == 1 and handle.sent[0].places is None:
            return received[0]
        shape = (handle.num_rows * handle.bank.top_k, width)
        pairs = torch.zeros(shape, dtype=self._dtype, device=self._device)
        for sent, part in zip(handle.sent, received, strict=True):
            if sent.places is not None:
                pairs[sent.places] = part
        return pairs

    def _weigh(self, handle: RemoteHandle, pairs: Tensor) -> Tensor:
        """The same sum over the same pairs as the local dispatcher's."""
        places = (handle.topk_ids.flatten() >= 0).nonzero().squeeze(1)  # device-to-host sync
        weights = handle.topk_weights.float().flatten()
        if len(places) < len(pairs):
            pairs, weights = pairs[places], weights[places]
        rows = places // handle.bank.top_k
        float32_weights = handle.bank.float32_weights
        total = weighted_sum(pairs, weights, rows, handle.num_rows, float32_weights)
        return total.to(self._dtype)


def _with_weights(slots: Tensor, topk_weights: Tensor) -> Tensor:
    """[ranks, T, k] int32 slots and [T, k] weights -> [ranks, T, 2k] int32."""
    bits = topk_weights.float().contiguous().view(torch.int32)
    return torch.cat((slots, bits.expand(slots.shape)), dim=2)
