"""Attention over the paged cache on the device, against a CPU."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.gpu_check.compare import LIMITS, Worst
from benchmarks.gpu_check.section import Place, Report
from benchmarks.gpu_check.weights import RandomCheckpoint
from workers.engine.batch import MicroBatch, batch_order
from workers.kv.block_tables import BlockTables
from workers.kv.cache import KVCache
from workers.model import fp8
from workers.model.building_blocks import BuildingBlocks
from workers.model.compute_threads import ComputeThreads
from workers.model.cuda.blocks import CudaBlocks
from workers.requests.request import Request, SamplingParams
from workers.requests.sequence import SequenceState
from workers.scheduling.step_plan import PlannedRows

CPU = torch.device("cpu")
BLOCK = 16
Rows = tuple[int, int]
"""Keys up to the last row of a sequence, its own included, and rows; one row is a decode."""
BATCHES: dict[str, Sequence[Rows]] = {
    "one decode": ((37, 1),),
    "decodes": tuple((n, 1) for n in (1, 15, 16, 17, 64, 300, 513, 900)),
    "a prompt": ((200, 200),),
    "chunks": ((150, 150), (333, 70), (16, 16), (500, 1), (490, 64)),
    "all": ((40, 1), (700, 1), (33, 33), (257, 100)),
}
HEADS = ((16, 16, 128), (32, 8, 128), (8, 1, 64))
"""Query heads, key heads, elements."""
_WINDOWS = (None, 48)


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Attention of one model."""

    num_heads: int
    num_kv_heads: int
    dim: int

    def checkpoint(self) -> RandomCheckpoint:
        """A small model with such attention, of a family that names ``head_dim``."""
        model = RandomModel(
            family="dots1", hidden=64, layers=2, heads=self.num_heads, ffn=8, vocab=64
        )
        heads = {"num_key_value_heads": self.num_kv_heads, "head_dim": self.dim}
        return RandomCheckpoint({**model.config(), **heads}, CPU)


def run(place: Place, report: Report) -> None:
    """Every batch with every kind of heads, type, window and cache."""
    worst = Worst()
    for heads in HEADS:
        shape = Shape(num_heads=heads[0], num_kv_heads=heads[1], dim=place.size(heads[2], 16))
        for dtype in LIMITS:
            for kind in ("auto", "fp8"):
                for name in BATCHES:
                    what = f"{name}, {heads[0]} over {heads[1]} heads, cache {kind}"
                    with report.part(f"{what} {dtype}"):
                        _check(place, report, what, shape, dtype, kind, name, worst)
    report.value("largest differences", worst.found)
    report.say(worst.words)


def _check(
    place: Place,
    report: Report,
    what: str,
    shape: Shape,
    dtype: torch.dtype,
    kind: Any,
    name: str,
    worst: Worst,
) -> None:
    wanted = [sized(place, *rows) for rows in BATCHES[name]]
    there = Paged(shape, wanted, dtype, place.device, kind)
    here = Paged(shape, wanted, dtype, CPU, kind)
    for window in _WINDOWS:
        got, want = there.attend(window), here.attend(window)
        words = f"{what}, window {window}" if window else what
        worst.compare(report, words, got, want)


def sized(place: Place, length: int, count: int) -> Rows:
    """Keys and rows of a sequence, or few of them."""
    rows = min(count, place.size(count, 5))
    return (length - count) // place.size(1, 8) + rows, rows


class Paged:
    """A batch over a cache of random keys and values, and the attention that the device has."""

    def __init__(
        self,
        shape: Shape,
        wanted: Sequence[Rows],
        dtype: torch.dtype,
        device: torch.device,
        kind: Any = "auto",
    ) -> None:
        checkpoint = shape.checkpoint()
        blocks = CudaBlocks() if device.type == "cuda" else BuildingBlocks()
        self._attend = blocks.attention(checkpoint.config, dtype)
        num_blocks = sum(-(-n // BLOCK) for n, _ in wanted) + 3
        self.cache = KVCache(
            config=checkpoint.config,
            num_blocks=num_blocks,
            block_size=BLOCK,
            dtype=dtype,
            device=device,
            compute_threads=ComputeThreads(),
            kv_cache_dtype=kind,
        )
        self._fill(num_blocks, shape, dtype)
        planned, tables = plan(wanted, num_blocks)
        inputs = MicroBatch(planned, self.cache, tables, device).inputs
        assert inputs is not None, "there are rows"
        self.batch = inputs.attention
        """Where the rows write, and what they read."""
        width = max(-(-n // BLOCK) for n, _ in wanted)
        self.tables = torch.from_numpy(tables.array[[_seat(p) for p in planned], :width]).to(device)
        """[sequences, blocks] int32, in the order of the rows."""
        num_rows = sum(rows for _, rows in wanted)
        counts = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        self.rows = [
            _draw((num_rows, n, shape.dim), i).to(device, dtype) for i, n in enumerate(counts)
        ]

    def attend(self, window: int | None = None) -> Tensor:
        """[T, A * D]."""
        batch = self.batch if window is None else self.batch.within(window)
        queries, keys, values = self.rows
        return self._attend(queries, keys, values, self.cache.layers[0], batch)

    def _fill(self, num_blocks: int, shape: Shape, dtype: torch.dtype) -> None:
        """The same numbers in every cache, but for the null block."""
        layer = self.cache.layers[0]
        numbers = _draw((layer.shape[0], num_blocks, BLOCK, shape.dim), 9).to(dtype)
        if layer.dtype == fp8.ROW_DTYPE:
            numbers = fp8.encode(numbers)
        layer[:, :num_blocks] = numbers.to(layer.device)


def plan(wanted: Sequence[Rows], num_blocks: int) -> tuple[list[PlannedRows], BlockTables]:
    """Sequences whose blocks lie anywhere in the cache."""
    blocks = random.Random(5).sample(range(num_blocks), num_blocks)
    tables = BlockTables(len(wanted), max(-(-n // BLOCK) for n, _ in wanted))
    planned = []
    for i, (length, count) in enumerate(wanted):
        output = [1] if count == 1 and length > 1 else []
        prompt = tuple(range(length - len(output)))
        request = Request(request_id=str(i), prompt=prompt, params=SamplingParams())
        sequence = SequenceState(request, 0, i, math.inf, output=output)
        sequence.seat = tables.take_seat()
        sequence.blocks = [blocks.pop() for _ in range(-(-length // BLOCK))]
        tables.put(sequence.seat, 0, sequence.blocks)
        first = length - count
        planned.append(PlannedRows(sequence, first, count, bool(output), 0, False))
    return sorted(planned, key=batch_order), tables


def _seat(planned: PlannedRows) -> int:
    assert planned.sequence.seat is not None
    return planned.sequence.seat


def _draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
