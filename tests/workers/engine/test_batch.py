"""What a micro-batch tells the model, against a reference that looks at one row after the other."""

from __future__ import annotations

import ctypes
import math
import random

import pytest
import torch

from tests.paths import DEMO
from workers.engine.batch import (
    MicroBatch,
    PlannedBatchRows,
    batch_order,
    positions_and_lengths,
    row_chunks,
    split_rows,
)
from workers.kv.block_tables import BlockTables
from workers.kv.cache import KVCache
from workers.model.attention_batch import group_size
from workers.model.compute_threads import ComputeThreads
from workers.model.loading.checkpoint import Checkpoint
from workers.requests.request import Request, SamplingParams
from workers.requests.sequence import SequenceState
from workers.scheduling.step_plan import PlannedRows

BLOCK_SIZE = 4
NUM_BLOCKS = 400
MAX_BLOCKS = 13


@pytest.fixture(scope="module")
def cache() -> KVCache:
    return KVCache(
        config=Checkpoint(DEMO).config,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        dtype=torch.float32,
        device=torch.device("cpu"),
        compute_threads=ComputeThreads(),
    )


class Plans:
    """Random plans of sequences whose blocks are in tables."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self.tables = BlockTables(16, MAX_BLOCKS)
        self._blocks = self._rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)

    def draw(self) -> list[PlannedRows]:
        decodes = [self._rows(is_decode=True) for _ in range(self._rng.randint(0, 8))]
        chunks = [self._rows(is_decode=False) for _ in range(self._rng.randint(0, 4))]
        return sorted((*decodes, *chunks), key=batch_order)

    def _rows(self, is_decode: bool) -> PlannedRows:
        rng = self._rng
        prompt = tuple(rng.randrange(1000) for _ in range(rng.randint(1, 25)))
        output = [rng.randrange(1000) for _ in range(rng.randint(1, 25) if is_decode else 0)]
        request = Request(request_id=str(rng.random()), prompt=prompt, params=SamplingParams())
        sequence = SequenceState(request, 0, 0, math.inf, output=output)
        first = sequence.num_tokens - 1 if is_decode else rng.randrange(len(prompt))
        count = 1 if is_decode else rng.randint(1, len(prompt) - first)
        sequence.seat = self.tables.take_seat()
        for place in range(-(-sequence.num_tokens // BLOCK_SIZE)):
            block = self._blocks.pop()
            self.tables.put(sequence.seat, place, [block])
            sequence.blocks.append(block)
        return PlannedRows(sequence, first, count, is_decode, 0, False)


def check(batch: MicroBatch, planned: list[PlannedRows]) -> None:
    """The batch has exactly the planned rows."""
    rows = [
        (entry.sequence, position)
        for entry in planned
        for position in range(entry.first, entry.first + entry.count)
    ]
    if not rows:
        assert batch.inputs is None
        return
    inputs = batch.inputs
    assert inputs is not None
    tokens = [(*s.request.prompt, *s.output)[position] for s, position in rows]
    slots = [s.blocks[p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE for s, p in rows]
    keys = [(s.key ^ (p * 0x9E3779B97F4A7C15)) & ((1 << 63) - 1) for s, p in rows]
    assert inputs.token_ids.tolist() == tokens
    assert inputs.positions.tolist() == [position for _, position in rows]
    assert inputs.prompt_lengths.tolist() == [len(s.request.prompt) for s, _ in rows]
    assert (positions_and_lengths(planned) == [inputs.positions, inputs.prompt_lengths]).all()
    assert inputs.attention.slot_mapping.tolist() == slots
    sent = PlannedBatchRows(planned, torch.device("cpu"))
    assert sent.row_key.tolist() == keys
    num_decodes = sum(entry.is_decode for entry in planned)
    assert sent.is_prefill.tolist() == [i >= num_decodes for i in range(len(rows))]
    check_tables(batch, planned)


def check_native_rows(planned: list[PlannedRows], tables: BlockTables) -> None:
    """Native kernels get the places of all rows."""
    chunks, row = row_chunks(planned, tables), 0
    for place, entry in zip(chunks.places.tolist(), planned, strict=True):
        sequence = entry.sequence
        first_row, count, first_position, address = place
        assert (first_row, count, first_position) == (row, entry.count, entry.first)
        blocks = (ctypes.c_int32 * len(sequence.blocks)).from_address(address)
        assert list(blocks) == sequence.blocks
        row += count
    assert chunks.num_rows == row
    assert chunks.max_length == max(entry.first + entry.count for entry in planned)


def check_tables(batch: MicroBatch, planned: list[PlannedRows]) -> None:
    """Each decode row and each chunk is led to its own blocks, and to the null block behind."""
    assert batch.inputs is not None
    attention = batch.inputs.attention
    seen = 0
    for group in attention.decodes:
        assert group.first == seen
        tables = group.blocks.view(group.last - group.first, -1)
        for table, visible in zip(tables, group.visible, strict=True):
            entry = planned[seen]
            blocks = entry.sequence.blocks
            width = group_size(len(blocks))
            assert table.tolist() == blocks + [NUM_BLOCKS] * (width - len(blocks))
            assert visible.sum() == entry.first + 1
            seen += 1
    for chunk, entry in zip(attention.prefills, planned[seen:], strict=True):
        length = entry.first + entry.count
        assert (chunk.length, chunk.last - chunk.first) == (length, entry.count)
        assert chunk.blocks.tolist() == entry.sequence.blocks[: -(-length // BLOCK_SIZE)]


@pytest.mark.parametrize("seed", range(30))
def test_a_batch_has_the_rows_of_its_plan(cache: KVCache, seed: int) -> None:
    plans = Plans(seed)
    planned = plans.draw()
    check(MicroBatch(planned, cache, plans.tables, torch.device("cpu")), planned)
    if planned:
        check_native_rows(planned, plans.tables)
    num_rows = sum(entry.count for entry in planned)
    parts = split_rows(planned, random.Random(seed).randint(0, num_rows))
    for part in parts:
        check(MicroBatch(part, cache, plans.tables, torch.device("cpu")), part)
    assert sum(entry.count for part in parts for entry in part) == num_rows


@pytest.mark.parametrize("seed", range(30))
def test_a_batch_that_is_read_in_place_has_the_tables_of_all_sequences(
    cache: KVCache, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "is_read_in_place", True)  # as on a GPU
    plans = Plans(seed)
    planned = plans.draw()
    batch = MicroBatch(planned, cache, plans.tables, torch.device("cpu"))
    if not planned:
        assert batch.inputs is None
        return
    assert batch.inputs is not None
    attention = batch.inputs.attention
    assert not attention.decodes
    assert not attention.prefills
    paged = attention.paged
    assert paged is not None
    assert {x.dtype for x in (paged.tables, paged.lengths, paged.first_rows)} == {torch.int32}
    assert paged.num_decodes == sum(entry.is_decode for entry in planned)
    assert paged.lengths.tolist() == [entry.first + entry.count for entry in planned]
    row, first_rows, chunks = 0, [0], []
    for table, entry in zip(paged.tables.tolist(), planned, strict=True):
        blocks = entry.sequence.blocks
        assert table[: len(blocks)] == blocks
        if not entry.is_decode:
            chunks.append((row, row + entry.count, entry.first + entry.count))
        row += entry.count
        first_rows.append(row)
    assert paged.first_rows.tolist() == first_rows
    assert paged.chunks == tuple(chunks)


def test_what_a_gpu_gathers_at_a_time_is_bounded() -> None:
    """256 MiB of dequantized keys and values, and no more, where no kernel reads them in place."""
    config = Checkpoint(DEMO).config
    cache = KVCache(
        config=config,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        dtype=torch.bfloat16,
        device=torch.device("meta"),
        compute_threads=ComputeThreads(),
        kv_cache_dtype="fp8",
    )
    assert not cache.is_read_in_place
    block_bytes = 2 * config.num_kv_heads * BLOCK_SIZE * (config.head_dim + 1) * 2
    assert 255 << 20 < cache.blocks_per_piece * block_bytes <= 256 << 20
