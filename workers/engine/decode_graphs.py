"""Decode steps as CUDA graphs: the host launches all kernels of a step with one call.

Launching the several hundred kernels of a step one by one takes longer on the host than running
them takes on the GPU. A step is captured once per bucket (a number of rows) and replayed for every
step that fits. Missing rows are padding, which writes to its own KV block. Inputs are at fixed
addresses: all integers are copied in every step, block tables only where they changed. Each step
keeps the tokens that it draws, so that the next step can run before the host knows them. If other
workers have the experts, and the transport cannot be captured, a step has one graph for each part
between two exchanges (``StepGraph``).

Source: buckets as in vLLM and SGLang.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.cuda.step_graph import StepGraph, StepGraphCache
from workers.dispatch.dispatcher import CapturableDispatcher, CapturedExchanges
from workers.engine.batch import row_columns
from workers.engine.expert_load import RoutedDecodes
from workers.kv.block_tables import BlockTables
from workers.kv.cache import KVCache
from workers.model.attention_batch import AttentionBatch, PagedRows
from workers.model.host_copies import to_device
from workers.model.layers import ModelInputs
from workers.native.draws import NUM_DRAW_INTEGERS
from workers.requests.buckets import bucket_of, kept_rows
from workers.requests.step_header import MAX_MICRO_BATCHES, StepHeader
from workers.sampling.best_tokens import finite_rows
from workers.sampling.draws import as_integers, draw_params
from workers.sampling.logits_processors import SamplingRow
from workers.scheduling.step_plan import PlannedRows

_TOKENS, _POSITIONS, _PROMPT_LENGTHS, _SLOTS, _SEATS, _LENGTHS, _IS_ROW, _DRAW = range(8)
_DRAW_INDEX = _DRAW + 2
"""Column of ``index`` of ``DRAW_ROW``; the integers of ``DRAW_ROW`` begin at column ``_DRAW``."""
_NUM_COLUMNS = _DRAW + NUM_DRAW_INTEGERS

Compute = Callable[[Sequence[ModelInputs]], tuple[Tensor, Sequence[Tensor], Tensor]]
"""Function that runs a model for the rows of each micro-batch. It returns the hidden states [T, H]
of all rows, for each bank the chosen experts [T, k] int64, and the logits [T, V]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeOutput:
    """Outputs of the model's layers for the decode rows of a step."""

    hidden: Tensor
    """Hidden states after the last layer, [T, H]; the next step overwrites this and the following
    tensors."""
    logits: Tensor
    """Logits [T, V]."""
    drawn: Tensor
    """The token sampled from each row's unprocessed logits, -1 for a row whose logits have NaN or
    infinity, and whether the hidden states are finite (0 or 1): [T, 2] int64."""
    routed: RoutedDecodes
    """The logical experts that the routers chose."""


@dataclass(frozen=True, slots=True)
class _CapturedStep:
    """A decode step captured as a CUDA graph, with the tensors that its replays read and write.

    T is the number of rows of all micro-batches, each padded to the bucket.
    """

    memory: Tensor
    """Integer inputs of two steps, [2, columns, T] int64 in pinned host memory. Steps use them in
    turn, as the copy of the step before may still read the other."""
    staging: NDArray[np.int64]
    """The same memory as an array."""
    numbers: Tensor
    """Integer inputs of the step, [columns, T] int64 on the device: a copy from ``memory``."""
    graph: StepGraph
    hidden: Tensor
    drawn: Tensor
    """See ``DecodeOutput.drawn``: [T, 2] int64."""
    topk_ids: Tensor
    """Experts that the routers chose, [sum of k over the banks, T] int64: transposed, one bank
    after another."""
    exchanges: CapturedExchanges


class DecodeGraphs:
    """CUDA graphs of the decode steps of one model with its KV cache. Data thread only.

    Args:
        compute: runs the model, with exchanges through the dispatcher. Must not synchronize.
        model: returns a key of the model; if the key changes, graphs are captured again.
        dispatcher: the engine's dispatcher.
        cache: the KV cache, whose blocks the attention kernels must read in place.
        tables: block tables of the sequences.
        top_k: number of experts per row, for each bank.
        buckets: numbers of rows for which steps are captured, ascending.
        rank: rank of the attention worker.
    """

    def __init__(
        self,
        compute: Compute,
        model: Callable[[], Hashable],
        dispatcher: CapturableDispatcher,
        cache: KVCache,
        tables: BlockTables,
        top_k: Sequence[int],
        buckets: Sequence[int],
        rank: int,
    ) -> None:
        assert cache.is_read_in_place, "block tables are read on the device"
        self._compute = compute
        self._model = model
        self.dispatcher = dispatcher
        self._cache = cache
        self._tables = tables
        self._ends = tuple(itertools.accumulate(top_k))
        self._buckets = buckets
        self._rank = rank
        self._device = cache.layers[0].device
        self._kept = StepGraphCache[_CapturedStep](kept_rows(buckets))
        num_seats, max_blocks = tables.array.shape
        self._scratch_seat, self._max_blocks = num_seats, max_blocks
        self._draw_params = SeatDrawParams(num_seats)
        self._newest = torch.zeros(num_seats + 1, dtype=torch.int64, device=self._device)
        """The token that the latest step drew for each seat, which all captured steps write."""
        self._turn = 0
        self._logits: Tensor | None = None
        """Logits of the latest step, [rows, V], which all captured steps write; None before the
        first capture."""
        self._blocks: Tensor | None = None
        """Block tables on the device, [num_seats + 1, max_blocks] int32, with a row for padding at
        the end; None before the first capture."""

    def can_run(self, header: StepHeader) -> bool:
        """Whether a graph can run a step of decode rows on this rank."""
        has_rows = header.edge_rows(self._rank, header.num_micro_batches - 1) > 0
        return has_rows and self.dispatcher.can_capture(header) and self._size(header) > 0

    def is_captured(self, header: StepHeader) -> bool:
        """Whether a graph can run a step, and is captured already.

        During a capture the host could not be interrupted, if the step before never ends.
        """
        if not self.can_run(header):
            return False
        shape = self.dispatcher.captured_shape(header)
        return self._kept.has(self._state, (self._size(header), header.num_micro_batches, shape))

    def capture(self) -> None:
        """Capture the steps of one micro-batch for all buckets, before the first step.

        Use it only with a dispatcher that permits a capture outside a step (``LocalDispatcher``).
        The largest bucket is first, as smaller graphs share its memory.
        """
        for size in reversed(self._buckets):
            self._step(size, 1, None)

    def run(
        self, header: StepHeader, parts: Sequence[Sequence[PlannedRows]], *, is_ahead: bool = False
    ) -> DecodeOutput:
        """Run a step, which the dispatcher has begun, by one replay of a graph.

        ``parts``: the decode rows of each micro-batch. A step of new size is captured first.
        ``is_ahead``: the step before, which was captured too, may still run. Each row reads the
        token that it drew for the sequence. The host must have waited for all earlier steps.
        """
        self._refresh_tables()
        size = self._size(header)
        step = self._step(size, len(parts), self.dispatcher.captured_shape(header))
        self._turn = 1 - self._turn
        columns = np.split(step.staging[self._turn], len(parts), axis=1)  # which share the memory
        for staging, part in zip(columns, parts, strict=True):
            self._fill(staging, part, is_ahead)
        step.numbers.copy_(step.memory[self._turn], non_blocking=True)
        step.graph.replay()
        step.exchanges.replayed()
        # Cloned: the next step overwrites the ids before they are counted.
        ids = _without_padding(step.topk_ids, 1, size, parts).clone()
        assert self._logits is not None, "a step was captured"
        return DecodeOutput(
            hidden=_without_padding(step.hidden, 0, size, parts),
            logits=_without_padding(self._logits, 0, size, parts),
            drawn=_without_padding(step.drawn, 0, size, parts),
            routed=RoutedDecodes(ids, self._ends),
        )

    def _size(self, header: StepHeader) -> int:
        """Return the bucket of a step; 0 if the step has more rows than the largest bucket."""
        return header.bucket or bucket_of(header.rows(self._rank, 0), self._buckets)

    @property
    def _state(self) -> Hashable:
        """A value that changes when captured steps become invalid."""
        return self._model(), self.dispatcher.captured_state

    def _step(self, size: int, num_parts: int, shape: Hashable) -> _CapturedStep:
        self._kept.keep_only(self._state)
        return self._kept.get(
            (size, num_parts, shape),
            size * num_parts,
            lambda pool: self._capture(size, num_parts, pool),
        )

    def _refresh_tables(self) -> Tensor:
        """Copy changed entries of the block tables to the device; return all tables there,
        [num_seats + 1, max_blocks] int32."""
        if self._blocks is None:
            scratch = np.full((1, self._max_blocks), self._cache.scratch_block, dtype=np.int32)
            whole = np.concatenate([self._tables.array, scratch])
            self._blocks = to_device(whole, self._device)
            self._tables.follow()
        indices, blocks = self._tables.take_changes()
        if len(indices):
            columns = to_device(np.stack([indices, blocks]), self._device)
            self._blocks.view(-1).index_copy_(0, columns[0], columns[1].int())
        return self._blocks

    def _fill(
        self, staging: NDArray[np.int64], planned: Sequence[PlannedRows], is_ahead: bool
    ) -> None:
        """Write the inputs of one micro-batch to ``staging``, then padding rows.

        A padding row has token 0, and writes its KV to a block that no request uses. If
        ``is_ahead``, the token of a planned row is -1: unknown to the host.
        """
        count = len(planned)
        if count:
            columns = row_columns(planned, self._tables, self._cache.block_size)
            staging[[_TOKENS, _POSITIONS, _PROMPT_LENGTHS, _SLOTS], :count] = columns
            if is_ahead:
                staging[_TOKENS, :count] = -1
            seats = np.array([rows.sequence.seat for rows in planned], dtype=np.int64)
            staging[_SEATS, :count] = seats
            staging[_LENGTHS, :count] = columns[1] + 1
            staging[_DRAW:, :count] = self._draw_params.of(planned, seats).T
            staging[_DRAW_INDEX, :count] = columns[1] + 1 - columns[2]
        staging[:, count:] = 0
        staging[_SLOTS, count:] = self._cache.scratch_block * self._cache.block_size
        staging[_SEATS, count:] = self._scratch_seat
        staging[_IS_ROW, :count] = 1
        staging[[_PROMPT_LENGTHS, _LENGTHS], count:] = 1

    def _capture(self, size: int, num_parts: int, pool: Any) -> _CapturedStep:
        """Capture a step after one normal run, which compiles kernels and allocates memory."""
        memory = torch.empty(2, _NUM_COLUMNS, num_parts * size, dtype=torch.int64)
        if torch.cuda.is_available():
            memory = memory.pin_memory()
        staging: NDArray[np.int64] = memory.numpy()
        self._fill(staging[0], (), is_ahead=False)
        numbers = memory[0].to(self._device, non_blocking=True)
        blocks, is_row = self._refresh_tables(), numbers[_IS_ROW]
        with self.dispatcher.capture(is_row, None):
            *_, logits = self._run(numbers, blocks, num_parts)
        kept = self._logits_of(logits)
        graph = StepGraph(self._device, pool)
        with self.dispatcher.capture(is_row, graph) as exchanges, graph.capture():
            hidden, drawn, topk_ids, logits = self._run(numbers, blocks, num_parts)
            kept.copy_(logits)
        return _CapturedStep(memory, staging, numbers, graph, hidden, drawn, topk_ids, exchanges)

    def _logits_of(self, logits: Tensor) -> Tensor:
        """Return the part of ``_logits`` that a captured step with such logits writes.

        Its memory never moves: room for all rows is allocated at the first capture.
        """
        if self._logits is None:
            most = max(MAX_MICRO_BATCHES * self._buckets[-1], len(logits))
            self._logits = logits.new_zeros(most, logits.shape[1])
        return self._logits[: len(logits)]

    def _run(
        self, numbers: Tensor, blocks: Tensor, num_parts: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the model; return ``hidden``, ``drawn`` and ``topk_ids`` of ``_CapturedStep``, and
        the logits."""
        from workers.cuda.draw import draw_rows  # late: needs Triton

        parts = torch.chunk(numbers, num_parts, dim=1)
        hidden, ids, logits = self._compute([self._inputs(part, blocks) for part in parts])
        tokens = draw_rows(logits, numbers[_DRAW:].t(), is_masked=False)
        self._newest.index_copy_(0, numbers[_SEATS], tokens.clamp(min=0))
        drawn = torch.stack([tokens, finite_rows(hidden).long()], dim=1)
        return hidden, drawn, torch.cat([own.t() for own in ids]), logits

    def _inputs(self, numbers: Tensor, blocks: Tensor) -> ModelInputs:
        """Return the inputs of one micro-batch from its ``_CapturedStep.numbers``."""
        size, device = numbers.shape[1], self._device
        tokens, positions, prompt_lengths, slots, seats, lengths = numbers[:_IS_ROW]
        tokens = torch.where(tokens < 0, self._newest[seats], tokens)
        paged = PagedRows(
            tables=blocks.index_select(0, seats),
            lengths=lengths.int(),
            first_rows=torch.arange(size + 1, dtype=torch.int32, device=device),
            num_decodes=size,
            chunks=(),
        )
        cache = self._cache
        attention = AttentionBatch(
            slots, (), (), cache.workspaces, cache.compute_threads, paged=paged
        )
        return ModelInputs(tokens, positions, prompt_lengths, attention)


class SeatDrawParams:
    """Sampling parameters of running sequences, except ``index``, which changes in every step."""

    def __init__(self, num_seats: int) -> None:
        self._params = np.zeros((num_seats, NUM_DRAW_INTEGERS), dtype=np.int64)
        self._owners: list[tuple[int, int]] = [(-1, -1)] * num_seats
        """For each seat, arrival number and choice of the sequence with the known parameters."""

    def of(self, planned: Sequence[PlannedRows], seats: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the parameters of planned rows in ``seats``, [T, 6]; ``index`` is arbitrary."""
        for seat, rows in zip(seats.tolist(), planned, strict=True):
            sequence = rows.sequence
            owner = sequence.arrival, sequence.choice
            if self._owners[seat] != owner:
                row = SamplingRow(sequence.params, sequence.choice, 0)
                self._params[seat] = as_integers(draw_params([row]))
                self._owners[seat] = owner
        return self._params[seats]


def _without_padding(
    rows: Tensor, dim: int, size: int, parts: Sequence[Sequence[PlannedRows]]
) -> Tensor:
    """Remove padding rows: keep along ``dim`` the first rows of each micro-batch.

    Each micro-batch has ``size`` rows in ``rows``, of which ``len(part)`` are kept.
    """
    used = [rows.narrow(dim, i * size, len(part)) for i, part in enumerate(parts)]
    return used[0] if len(used) == 1 else torch.cat(used, dim=dim)
