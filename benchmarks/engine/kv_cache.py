"""Attention with a KV cache in bfloat16 and in fp8: ``python -m benchmarks.engine.kv_cache``.

Decode steps of a bfloat16 model on the native kernels with 4,000 tokens of context, over several
layers, so that the processor's caches cannot hold the keys and values. Both formats take turns in
one process; a time is the shortest CPU time of several turns.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from benchmarks.report.results import table
from cluster.config.kv_cache import KvCacheDType, kv_vector_bytes
from workers.kv.block_tables import BlockTables
from workers.model import fp8
from workers.model.attention import attend
from workers.model.attention_batch import AttentionBatch, RowChunks
from workers.model.attention_sublayer import (
    AttentionShape,
    RoutedProjections,
    SublayerStages,
    TorchAttentionSublayer,
)
from workers.model.compute_threads import ComputeThreads
from workers.model.layers import LayerContext
from workers.model.native.blocks import NativeBlocks
from workers.model.routing import Router, Routing
from workers.native.thread_team import ThreadTeam, start_kernels

_DTYPE = torch.bfloat16
_BLOCK = 16
_HIDDEN = 32
KINDS: tuple[KvCacheDType, ...] = ("auto", "fp8")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Decode rows of one model."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    batch: int
    """Sequences of one row each."""
    num_layers: int = 4
    context_tokens: int = 4000
    turns: int = 15
    """Measurements of each format."""


CASES = (
    Case(num_heads=8, num_kv_heads=8, head_dim=64, batch=1, num_layers=8),
    Case(num_heads=16, num_kv_heads=16, head_dim=128, batch=1),
    Case(num_heads=16, num_kv_heads=16, head_dim=128, batch=4),
    Case(num_heads=32, num_kv_heads=4, head_dim=128, batch=4),
)
QUICK = Case(
    num_heads=2, num_kv_heads=1, head_dim=16, batch=2, num_layers=1, context_tokens=40, turns=1
)
"""Enough to see that everything runs."""


@dataclass(frozen=True, slots=True)
class Found:
    """Results of both formats, in the order of ``KINDS``."""

    seconds: tuple[float, float]
    """Time of attention in one step, over all layers."""
    block_bytes: tuple[int, int]
    """Size of a block of one layer."""


class _Attention:
    """Decode rows at the end of their contexts, over a cache of one kind."""

    def __init__(self, case: Case, team: ThreadTeam, kind: KvCacheDType) -> None:
        self._stages = _stages(case, team)
        row_bytes = kv_vector_bytes(kind, case.head_dim, _DTYPE.itemsize)
        num_blocks = -(-case.context_tokens // _BLOCK)
        shape = (2 * case.num_kv_heads, case.batch * num_blocks, _BLOCK)
        self.block_bytes = 2 * case.num_kv_heads * _BLOCK * row_bytes
        draw = torch.Generator().manual_seed(1)
        vectors = torch.randn(*shape, case.head_dim, generator=draw)
        layer = fp8.encode(vectors) if kind == "fp8" else vectors.to(_DTYPE)
        self._layers = [layer.clone() for _ in range(case.num_layers)]
        heads = case.num_heads + 2 * case.num_kv_heads
        self._rows = torch.randn(case.batch, heads * case.head_dim, generator=draw).to(_DTYPE)
        # Blocks in random order, as in a worker that has served many requests.
        order = torch.randperm(case.batch * num_blocks, generator=draw).view(case.batch, -1)
        tables = BlockTables(case.batch, num_blocks)
        for seat, blocks in enumerate(order.tolist()):
            tables.put(seat, 0, blocks)
        self._context = _context(case, tables, self._layers[0])

    def step_s(self) -> float:
        """CPU seconds of one step; this is the only thread that computes."""
        began = time.thread_time()
        for cache in self._layers:
            self._stages.attend_rows(self._rows, cache, self._context)
        return time.thread_time() - began


def _stages(case: Case, team: ThreadTeam) -> SublayerStages:
    """An attention sublayer whose attention can run alone: one with routed projections."""
    blocks = NativeBlocks(team)
    routing = Routing(bank=0, num_experts=2, top_k=1, scoring="softmax", is_normed=False)
    weight = torch.zeros(2, _HIDDEN, dtype=_DTYPE)
    half = TorchAttentionSublayer(
        shape=AttentionShape(
            num_heads=case.num_heads,
            num_kv_heads=case.num_kv_heads,
            head_dim=case.head_dim,
            eps=1e-5,
        ),
        norm1=weight[0],
        projections=RoutedProjections(
            router=Router(routing=routing, linear=blocks.linear(weight), correction=None),
            kv=blocks.linear(weight),
            bias=weight[0],
        ),
        norm2=weight[0],
        router=None,
        attend=attend,
    )
    return cast(SublayerStages, blocks.sublayer(half))


def _context(case: Case, tables: BlockTables, cache: Tensor) -> LayerContext:
    batch, place = case.batch, case.context_tokens - 1
    places = [(row, 1, place, tables.address(row)) for row in range(batch)]
    chunks = RowChunks(batch, torch.tensor(places), tables.array, case.context_tokens)
    wave = torch.ones(batch, 1, case.head_dim, dtype=_DTYPE)
    none = torch.empty(0, dtype=torch.int64)
    rows = AttentionBatch(none, (), (), (), ComputeThreads(), chunks=chunks)
    return LayerContext(wave, wave, rows, {}, chunks.fields(wave, wave, cache))


def measure(case: Case, team: ThreadTeam) -> Found:
    """Measure both formats in turns."""
    both = [_Attention(case, team, kind) for kind in KINDS]
    for one in both:
        one.step_s()  # allocates pages and starts threads
    times = [[one.step_s() for one in both] for _ in range(case.turns)]
    plain_s, fp8_s = (min(column) for column in zip(*times, strict=True))
    return Found((plain_s, fp8_s), (both[0].block_bytes, both[1].block_bytes))


def section(quick: bool) -> str:
    """Return the Markdown section."""
    kernels = start_kernels(1)
    if kernels.team is None:
        return f"## KV cache in fp8\n\nNot measured: {kernels.description}."
    rows = []
    for case in (QUICK,) if quick else CASES:
        found = measure(case, kernels.team)
        plain_s, fp8_s = found.seconds
        rows.append(
            [
                f"{case.num_heads}/{case.num_kv_heads} x {case.head_dim}",
                str(case.batch),
                str(case.context_tokens),
                f"{plain_s * 1e6 / case.num_layers:.0f}",
                f"{fp8_s * 1e6 / case.num_layers:.0f}",
                f"{plain_s / fp8_s:.2f}",
                f"{found.block_bytes[0] / found.block_bytes[1]:.2f}",
            ]
        )
    about = " ".join((__doc__ or "").split("\n\n")[1].split())
    header = [
        "heads/KV heads x dim",
        "batch",
        "context",
        "bf16, us a layer",
        "fp8, us a layer",
        "speed-up",
    ]
    return (
        f"## KV cache in fp8\n\n{about} Kernels: {kernels.description}, one thread.\n\n"
        f"{table([*header, 'blocks in a byte, ratio'], rows)}"
    )


if __name__ == "__main__":
    sys.stdout.write(section(quick="--quick" in sys.argv[1:]) + "\n")
