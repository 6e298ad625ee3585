"""Time of one dispatch and combine, by transport: ``python -m benchmarks.dispatch``.

1 attention + 2 expert ranks, a process with one thread each, 64 rows of 2048 bfloat16, top-8 of 64
experts. The experts compute nothing; ``wire`` is the transport alone (rows there, as many rows
back), ``sum`` the whole dispatch and combine with deduplication and the weighted float32 sums.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from benchmarks.results import table
from cluster.cli.bench.idle_ranks import (
    DTYPE,
    Connected,
    Meetings,
    Shape,
    idle_server,
    remote_dispatcher,
    wait_for_the_end,
)
from cluster.cli.bench.ranks import run_ranks
from workers.dist.dispatcher import BatchRows
from workers.dist.transport import Expected, Message, Part, Tag


@dataclass(frozen=True)
class Case:
    """What is measured."""

    shape: Shape
    repeats: int

    @property
    def rows(self) -> int:
        """Of every step."""
        return self.shape.max_rows


@dataclass(frozen=True)
class Time:
    """Milliseconds of one exchange."""

    median: float = 0.0
    """Of all repeats after the first fifth."""
    fast: float = 0.0
    """The fastest tenth of them took at most this: what an idle machine does."""

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.fast:.3f})"


@dataclass(frozen=True)
class Times:
    """What one case took."""

    wire: Time
    """Transport alone."""
    sum: Time
    """Dispatch and combine."""


def measure(case: Case) -> Times:
    """Run one case in processes of its own."""
    shape = case.shape
    results = run_ranks(shape.size, _rank, case, Meetings(shape), timeout_s=120.0)
    times: Times = results[0]
    return times


def _rank(rank: int, size: int, ports: list[int], case: Case, meetings: Meetings) -> Times | None:
    with Connected(case.shape, rank, ports, meetings) as connected:
        if rank == 0:
            return _attention(connected, case)
        _expert(connected, rank - 1, case)
        return None


def _attention(connected: Connected, case: Case) -> Times:
    shape, transport = case.shape, connected.transport
    rows = torch.randn(case.rows, shape.width).to(DTYPE)
    scores, ids = torch.rand(case.rows, shape.num_experts).topk(shape.top_k)
    meta = ids.to(torch.int32)
    part = (Part(shape.width, DTYPE),)
    expected = [Expected(r, part, (case.rows,)) for r in range(shape.expert_ranks)]
    messages = [Message(r, (meta, rows)) for r in range(shape.expert_ranks)]

    def wire(step: int) -> None:
        transport.begin_step(shape.header(step, case.rows))
        transport.post(Tag(0, 0, 0, "rows"), messages, sized=False)
        transport.receive(Tag(0, 0, 0, "outputs"), expected, sized=False)

    dispatcher = remote_dispatcher(connected, 0, shape)
    batch = BatchRows.decode(case.rows)

    def whole(step: int) -> None:
        dispatcher.begin_step(shape.header(step, case.rows), [batch])
        dispatcher.combine(dispatcher.dispatch(rows, ids, scores, 0))

    return Times(wire=_time(wire, 1, case), sum=_time(whole, 1 + case.repeats, case))


def _time(call: Callable[[int], None], first_step: int, case: Case) -> Time:
    times = []
    for step in range(first_step, first_step + case.repeats):
        start = time.perf_counter()
        call(step)
        times.append((time.perf_counter() - start) * 1e3)
    kept = sorted(times[case.repeats // 5 :])
    return Time(median=statistics.median(kept), fast=kept[len(kept) // 10])


def _expert(connected: Connected, device: int, case: Case) -> None:
    shape, transport = case.shape, connected.transport
    parts = (Part(shape.top_k, torch.int32), Part(shape.width, DTYPE))
    expected = [Expected(0, parts, (case.rows, case.rows))]
    outputs = torch.ones(case.rows, shape.width, dtype=DTYPE)
    for step in range(1, 1 + case.repeats):
        transport.begin_step(shape.header(step, case.rows))
        transport.receive(Tag(0, 0, 0, "rows"), expected, sized=False)
        transport.post(Tag(0, 0, 0, "outputs"), [Message(0, (outputs,))], sized=False)
    server = idle_server(connected, device, transport, shape)
    for step in range(1 + case.repeats, 1 + 2 * case.repeats):
        server.run_step(shape.header(step, case.rows))
    wait_for_the_end(transport, shape, 1 + 2 * case.repeats)


def section(quick: bool) -> str:
    """The section of ``RESULTS.md``."""
    repeats = 20 if quick else 300
    rows = []
    transports: tuple[Literal["sockets", "collective"], ...] = ("sockets", "collective")
    for num_rows, width, expert_ranks in ((64, 2048, 2), (32, 512, 1)):
        for transport in transports:
            shape = Shape(
                attention_ranks=1,
                expert_ranks=expert_ranks,
                width=width,
                num_experts=64,
                top_k=8,
                max_rows=num_rows,
                transport=transport,
            )
            case = Case(shape, repeats)
            times = measure(case)
            name = f"{transport}, 1 + {expert_ranks} ranks, {num_rows} x {width}"
            rows.append([name, str(times.wire), str(times.sum)])
    head = ["transport, ranks, rows", "wire ms", "dispatch + combine ms"]
    return (
        "## Dispatch and combine\n\nOne exchange of bfloat16 rows, top-8 of 64 experts that "
        "compute nothing, one thread a rank. `wire` is the transport alone. Median of "
        f"{repeats * 4 // 5} repeats (the fastest tenth took at most).\n\n{table(head, rows)}"
    )


if __name__ == "__main__":
    sys.stdout.write(section(quick=False) + "\n")
