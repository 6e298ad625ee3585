"""Steps that are one exchange of rows: what they take, measured as in a cluster.

The time of the spans on the attention ranks, and the bytes on the expert ranks, are those of
``workers.dist.traced``.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

from cluster.cli.bench.idle_ranks import (
    DTYPE,
    Connected,
    Meetings,
    Shape,
    idle_server,
    remote_dispatcher,
    wait_for_the_end,
)
from workers.dist.dispatcher import BatchRows
from workers.dist.header import StepHeader
from workers.dist.traced import TracedDispatcher, TracedTransport

LEFT_OUT = 5
"""One in so many steps comes first and does not count."""


@dataclass
class SpanTimes:
    """``SpanSink`` that keeps the time of every span."""

    us: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """By name, microseconds."""

    def begin_step(self, header: StepHeader) -> bool:
        """Every step is kept."""
        return True

    def add(self, name: str, start_ns: int, end_ns: int, place: dict[str, Any]) -> None:
        """Keep a span."""
        self.us[name].append((end_ns - start_ns) / 1e3)

    def flush(self) -> None:
        """Nothing is held back."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What all ranks run, step by step."""

    shape: Shape
    tokens: tuple[int, ...]
    """Rows of each attention rank, one size after the other."""
    repeats: int
    """Steps of each size that count."""
    is_prefill: bool
    """Rows of prompts: every expert rank gets only those that it has an expert for."""
    seed: int

    @property
    def left_out(self) -> int:
        """Steps of each size that come first."""
        return -(-self.repeats // LEFT_OUT)

    def steps(self, size: int) -> range:
        """Numbers of the steps of a size."""
        each = self.left_out + self.repeats
        return range(1 + size * each, 1 + (size + 1) * each)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What one rank has measured, by size."""

    us: list[dict[str, list[float]]]
    """Of an attention rank: microseconds of ``dispatch`` and of ``combine``, by step."""
    num_bytes: list[dict[str, float]]
    """Of an expert rank: bytes a step, of ``dispatch`` and of ``combine``."""


def run_rank(rank: int, size: int, ports: list[int], plan: Plan, meetings: Meetings) -> Sizes:
    """One rank, for ``run_ranks``."""
    with Connected(plan.shape, rank, ports, meetings) as connected, torch.inference_mode():
        if rank >= plan.shape.attention_ranks:
            return _serve(connected, rank - plan.shape.attention_ranks, plan)
        found = _send(connected, rank, plan)
        meetings.all_served()
        return found


def _send(connected: Connected, rank: int, plan: Plan) -> Sizes:
    """The attention side: rows out, sums home."""
    shape = plan.shape
    inner = remote_dispatcher(connected, rank, shape)
    draw = torch.Generator().manual_seed(1000 * plan.seed + rank)
    found = []
    for size, count in enumerate(plan.tokens):
        times = SpanTimes()
        dispatcher = TracedDispatcher(inner, [times], [shape.bank])
        rows = torch.randn(count, shape.width, generator=draw).to(DTYPE)
        weights, ids = torch.rand(count, shape.num_experts, generator=draw).topk(shape.top_k)
        keys = torch.arange(count)
        batch = BatchRows(is_prefill=torch.full((count,), plan.is_prefill), row_key=keys)
        for step in plan.steps(size):
            dispatcher.begin_step(shape.header(step, count, plan.is_prefill), [batch])
            dispatcher.combine(dispatcher.dispatch(rows, ids, weights, 0))
            dispatcher.end_step()
        found.append({name: times.us[name][plan.left_out :] for name in ("dispatch", "combine")})
    return Sizes(found, [])


def _serve(connected: Connected, device: int, plan: Plan) -> Sizes:
    """The expert side, until the attention ranks close."""
    shape = plan.shape
    transport = TracedTransport(connected.transport, (), [shape.bank])
    server = idle_server(connected, device, transport, shape)
    found = []
    for size, count in enumerate(plan.tokens):
        before = dict(transport.num_bytes)
        for step in plan.steps(size):
            server.run_step(shape.header(step, count, plan.is_prefill))
        steps = len(plan.steps(size))
        found.append({k: (n - before[k]) / steps for k, n in transport.num_bytes.items()})
    wait_for_the_end(connected.transport, shape, plan.steps(len(plan.tokens)).start)
    return Sizes([], found)
