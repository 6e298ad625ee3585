"""Decode steps on a GPU as CUDA graphs: the host launches all kernels of a step at once.

Launched one by one, the some hundred kernels of a step cost the host more than they cost the GPU. A
graph is captured once for each of a few numbers of rows, its bucket, and replayed for every step
that fits; missing rows repeat nothing and write to a block of their own. What a step changes is at
fixed addresses: its numbers come in one copy, and of the block tables what is new.

Source: "Getting started with CUDA graphs" (NVIDIA, 2019); buckets as in vLLM and SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.dispatch.dispatcher import CapturableDispatcher, CapturedExchanges
from workers.engine.batch import row_columns
from workers.engine.step_plan import PlannedRows
from workers.kv.block_tables import BlockTables
from workers.kv.cache import KVCache
from workers.model.attention import AttentionBatch, PagedRows
from workers.model.host_copies import to_device
from workers.model.layers import ModelInputs
from workers.requests.step_header import StepHeader

BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Rows of the graphs: at most half of them are padding. Reading the weights is the cost of a decode
step, so padding is nearly free, and each graph takes some memory."""
_TOKENS, _POSITIONS, _PROMPT_LENGTHS, _SLOTS, _SEATS, _LENGTHS, _IS_ROW, _NUM_COLUMNS = range(8)

Compute = Callable[[ModelInputs], tuple[Tensor, Sequence[Tensor]]]
"""All layers of a model: hidden states [T, H], and by bank the chosen experts [T, k] int64."""


@dataclass(frozen=True, slots=True)
class DecodeOutput:
    """What the layers gave for the rows of a step."""

    hidden: Tensor
    """[T, H], overwritten by the next step."""
    topk_ids: Sequence[Tensor]
    """By bank: [T, k] int64."""


@dataclass(frozen=True, slots=True)
class _Graph:
    staging: NDArray[np.int64]
    """[columns, bucket] in memory of the host that a copy may read later."""
    numbers: Tensor
    """[columns, bucket] int64 on the device."""
    graph: Any
    hidden: Tensor
    topk_ids: Tensor
    """[sum of k over the banks, bucket] int64: the banks' transposed, one under the other."""
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
    """

    def __init__(
        self,
        compute: Compute,
        model: Callable[[], Hashable],
        dispatcher: CapturableDispatcher,
        cache: KVCache,
        tables: BlockTables,
        top_k: Sequence[int],
    ) -> None:
        assert cache.is_read_in_place, "block tables are read on the device"
        self._compute = compute
        self._model = model
        self._dispatcher = dispatcher
        self._captured: Hashable = None
        self._cache = cache
        self._tables = tables
        self._top_k = list(top_k)
        self._device = cache.layers[0].device
        self._graphs: dict[int, _Graph] = {}
        self._pool: Any = None
        num_seats, max_blocks = tables.array.shape
        self._scratch_seat, self._max_blocks = num_seats, max_blocks
        self._blocks: Tensor | None = None
        """[num_seats + 1, max_blocks] int32 on the device: the tables, while graphs are in use."""

    def can_run(self, header: StepHeader, num_rows: int) -> bool:
        """Whether ``run`` takes a step of so many decode rows."""
        return 0 < num_rows <= BUCKETS[-1] and self._dispatcher.can_capture(header)

    def drop_unusable(self) -> None:
        """Give up the memory of all graphs if experts are on other workers now."""
        if self._blocks is not None and not self._dispatcher.has_all_experts:
            self._graphs.clear()
            self._pool = self._blocks = None
            self._tables.forget_changes()

    def capture(self, max_rows: int) -> None:
        """Capture the graphs of up to so many rows; the others share the memory of the largest."""
        self._check_state()
        last = next((size for size in BUCKETS if size >= max_rows), BUCKETS[-1])
        for size in reversed(BUCKETS[: BUCKETS.index(last) + 1]):
            self._graph(size)

    def run(self, planned: Sequence[PlannedRows]) -> DecodeOutput:
        """Run decode rows, in a step that the dispatcher has begun."""
        size = next(size for size in BUCKETS if size >= len(planned))
        self._check_state()
        self._refresh_tables()
        graph = self._graph(size)
        self._fill(graph.staging, planned)
        graph.numbers.copy_(torch.from_numpy(graph.staging), non_blocking=True)
        graph.graph.replay()
        graph.exchanges.replayed()
        count = len(planned)
        # The next step overwrites them, and those of this one are counted later.
        ids = torch.split(graph.topk_ids[:, :count].clone(), self._top_k)
        return DecodeOutput(graph.hidden[:count], [own.t() for own in ids])

    def _check_state(self) -> None:
        """Drop the graphs of another state."""
        state = self._model(), self._dispatcher.captured_state
        if state != self._captured:
            self._graphs.clear()
            self._pool = None  # torch gives no memory to one whose graphs are all gone
            self._captured = state

    def _graph(self, size: int) -> _Graph:
        graph = self._graphs.get(size)
        if graph is None:
            graph = self._graphs[size] = self._capture(size)
        return graph

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

    def _capture(self, size: int) -> _Graph:
        """Capture the graph of a bucket, after a run that compiles and allocates."""
        staging = torch.empty(_NUM_COLUMNS, size, dtype=torch.int64)
        if torch.cuda.is_available():
            staging = staging.pin_memory()
        columns: NDArray[np.int64] = staging.numpy()
        self._fill(columns, ())
        numbers = staging.to(self._device, non_blocking=True)
        blocks = self._refresh_tables()
        with self._dispatcher.capture(numbers[_IS_ROW]):
            self._layers(numbers, blocks)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        # Threads beside this one load experts and lend blocks meanwhile.
        capturing = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        with self._dispatcher.capture(numbers[_IS_ROW]) as exchanges, capturing:
            hidden, topk_ids = self._layers(numbers, blocks)
        return _Graph(columns, numbers, graph, hidden, topk_ids, exchanges)

    def _layers(self, numbers: Tensor, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """``hidden`` and ``topk_ids`` of a graph."""
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
        hidden, ids = self._compute(ModelInputs(tokens, positions, prompt_lengths, attention))
        return hidden, torch.cat([own.t() for own in ids])
