"""Decode steps on a GPU as CUDA graphs: the host launches all kernels of a step at once.

Launched one by one, the some hundred kernels of a step cost the host more than they cost the GPU. A
step is captured once for each of a few numbers of rows, its bucket, and replayed for every step
that fits; missing rows are padding, which writes to a block of its own. What a step changes is at
fixed addresses: its numbers come in one copy, and of the block tables what is new. With experts on
other workers a step is a graph for each piece between two exchanges (``StepGraph``).

Source: buckets as in vLLM and SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.cuda.step_graph import KeptSteps, StepGraph
from workers.dispatch.dispatcher import CapturableDispatcher, CapturedExchanges
from workers.engine.batch import row_columns
from workers.kv.block_tables import BlockTables
from workers.kv.cache import KVCache
from workers.model.attention_batch import AttentionBatch, PagedRows
from workers.model.host_copies import to_device
from workers.model.layers import ModelInputs
from workers.requests.buckets import bucket_of, kept_rows
from workers.requests.step_header import StepHeader
from workers.scheduling.step_plan import PlannedRows

_TOKENS, _POSITIONS, _PROMPT_LENGTHS, _SLOTS, _SEATS, _LENGTHS, _IS_ROW, _NUM_COLUMNS = range(8)

Compute = Callable[[Sequence[ModelInputs]], tuple[Tensor, Sequence[Tensor]]]
"""All layers of a model, for the rows of each micro-batch: hidden states [T, H] of all of them, and
by bank the chosen experts [T, k] int64."""


@dataclass(frozen=True, slots=True)
class DecodeOutput:
    """What the layers gave for the rows of a step."""

    hidden: Tensor
    """[T, H], overwritten by the next step."""
    topk_ids: Sequence[Tensor]
    """By bank: [T, k] int64."""


@dataclass(frozen=True, slots=True)
class _CapturedStep:
    """T: rows of all micro-batches, as many as the bucket has in each."""

    staging: NDArray[np.int64]
    """[columns, T] in memory of the host that a copy may read later."""
    numbers: Tensor
    """[columns, T] int64 on the device."""
    graph: StepGraph
    hidden: Tensor
    topk_ids: Tensor
    """[sum of k over the banks, T] int64: the banks' transposed, one under the other."""
    exchanges: CapturedExchanges


class DecodeGraphs:
    """The graphs of one model and its KV cache. Data thread only.

    Args:
        compute: all layers, with rows exchanged by the dispatcher; may wait for nothing.
        model: what names the model; where that changes, graphs are captured anew.
        dispatcher: of the engine.
        cache: where keys and values are; must be read in place.
        tables: the blocks of sequences.
        top_k: of each bank.
        buckets: numbers of rows, ascending.
        rank: of the attention worker.
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
        self._dispatcher = dispatcher
        self._cache = cache
        self._tables = tables
        self._top_k = list(top_k)
        self._buckets = buckets
        self._rank = rank
        self._device = cache.layers[0].device
        self._kept = KeptSteps[_CapturedStep](kept_rows(buckets))
        num_seats, max_blocks = tables.array.shape
        self._scratch_seat, self._max_blocks = num_seats, max_blocks
        self._blocks: Tensor | None = None
        """[num_seats + 1, max_blocks] int32 on the device: the tables, while graphs are in use."""

    def can_run(self, header: StepHeader, num_rows: int) -> bool:
        """Whether ``run`` takes a step of so many decode rows of this rank."""
        return num_rows > 0 and self._dispatcher.can_capture(header) and self._size(header) > 0

    def capture(self) -> None:
        """Capture the steps of one micro-batch, before the first step.

        The dispatcher must not need one under way. The others share the memory of the largest.
        """
        for size in reversed(self._buckets):
            self._step(size, 1, None)

    def run(self, header: StepHeader, parts: Sequence[Sequence[PlannedRows]]) -> DecodeOutput:
        """Run the decode rows of each micro-batch, in a step that the dispatcher has begun."""
        self._refresh_tables()
        size = self._size(header)
        step = self._step(size, len(parts), self._dispatcher.captured_shape(header))
        columns = np.split(step.staging, len(parts), axis=1)  # which share the memory
        for staging, part in zip(columns, parts, strict=True):
            self._fill(staging, part)
        step.numbers.copy_(torch.from_numpy(step.staging), non_blocking=True)
        step.graph.replay()
        step.exchanges.replayed()
        # The next step overwrites them, and those of this one are counted later.
        ids = _without_padding(step.topk_ids, 1, size, parts).clone()
        hidden = _without_padding(step.hidden, 0, size, parts)
        return DecodeOutput(hidden, [own.t() for own in torch.split(ids, self._top_k)])

    def _size(self, header: StepHeader) -> int:
        """The bucket of a step; 0: it has more rows than any."""
        return header.bucket or bucket_of(header.rows(self._rank, 0), self._buckets)

    def _step(self, size: int, num_parts: int, shape: Hashable) -> _CapturedStep:
        self._kept.keep_only((self._model(), self._dispatcher.captured_state))
        return self._kept.get(
            (size, num_parts, shape),
            size * num_parts,
            lambda pool: self._capture(size, num_parts, pool),
        )

    def _refresh_tables(self) -> Tensor:
        """The block tables on the device, as they are now."""
        if self._blocks is None:
            scratch = np.full((1, self._max_blocks), self._cache.scratch_block, dtype=np.int32)
            whole = np.concatenate([self._tables.array, scratch])
            self._blocks = to_device(whole, self._device)
            self._tables.follow()
        places, blocks = self._tables.take_changes()
        if len(places):
            columns = to_device(np.stack([places, blocks]), self._device)
            self._blocks.view(-1).index_copy_(0, columns[0], columns[1].int())
        return self._blocks

    def _fill(self, staging: NDArray[np.int64], planned: Sequence[PlannedRows]) -> None:
        """Write the numbers of a step; rows without a request have a token 0 of their own."""
        count = len(planned)
        if count:
            columns = row_columns(planned, self._tables, self._cache.block_size)
            staging[[_TOKENS, _POSITIONS, _PROMPT_LENGTHS, _SLOTS], :count] = columns
            staging[_SEATS, :count] = np.array(
                [rows.sequence.seat for rows in planned], dtype=np.int64
            )
            staging[_LENGTHS, :count] = columns[1] + 1
        staging[:, count:] = 0
        staging[_SLOTS, count:] = self._cache.scratch_block * self._cache.block_size
        staging[_SEATS, count:] = self._scratch_seat
        staging[_IS_ROW, :count] = 1
        staging[[_PROMPT_LENGTHS, _LENGTHS], count:] = 1

    def _capture(self, size: int, num_parts: int, pool: Any) -> _CapturedStep:
        """Capture a step, after one that compiles and allocates."""
        memory = torch.empty(_NUM_COLUMNS, num_parts * size, dtype=torch.int64)
        if torch.cuda.is_available():
            memory = memory.pin_memory()
        staging: NDArray[np.int64] = memory.numpy()
        self._fill(staging, ())
        numbers = memory.to(self._device, non_blocking=True)
        blocks, is_row = self._refresh_tables(), numbers[_IS_ROW]
        with self._dispatcher.capture(is_row, None):
            self._layers(numbers, blocks, num_parts)
        graph = StepGraph(self._device, pool)
        with self._dispatcher.capture(is_row, graph) as exchanges, graph.capture():
            hidden, topk_ids = self._layers(numbers, blocks, num_parts)
        return _CapturedStep(staging, numbers, graph, hidden, topk_ids, exchanges)

    def _layers(self, numbers: Tensor, blocks: Tensor, num_parts: int) -> tuple[Tensor, Tensor]:
        """``hidden`` and ``topk_ids`` of a step."""
        parts = torch.chunk(numbers, num_parts, dim=1)
        hidden, ids = self._compute([self._inputs(part, blocks) for part in parts])
        return hidden, torch.cat([own.t() for own in ids])

    def _inputs(self, numbers: Tensor, blocks: Tensor) -> ModelInputs:
        """Of one micro-batch: numbers [columns, bucket]."""
        size, device = numbers.shape[1], self._device
        tokens, positions, prompt_lengths, slots, seats, lengths, _ = numbers
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


def _without_padding(
    rows: Tensor, dim: int, size: int, parts: Sequence[Sequence[PlannedRows]]
) -> Tensor:
    """Of T rows along ``dim`` those with a request; ``size`` of each micro-batch."""
    found = [rows.narrow(dim, i * size, len(part)) for i, part in enumerate(parts)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=dim)
