"""Time and bytes of one dispatch and combine: ``python -m benchmarks.dispatch``.

Every rank is a process of one thread on this host. The experts compute little: ``wire`` is the
transport alone (rows there, as many rows back), ``dispatch`` and ``combine`` are the whole exchange
with deduplication and the weighted float32 sums, ``experts`` the experts' part of it. ``--save``
writes a document for ``expertmesh bench compare``.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal

import torch

from benchmarks.engine.idle_ranks import (
    DTYPE,
    Connected,
    Meetings,
    Shape,
    idle_server,
    remote_dispatcher,
    wait_for_the_end,
)
from benchmarks.harness.distributed import run_ranks
from benchmarks.harness.mesh import GivenRows
from benchmarks.report import results
from benchmarks.report.options import add_output, counts
from cluster.cli.bench.document import document_of, format_number, show_and_save
from cluster.cli.terminal.arguments import count
from cluster.cli.terminal.output import note, table
from workers.metrics.step_timer import StepTimer
from workers.model.layers import Dispatch
from workers.requests.step_header import StepHeader
from workers.transport.transport import DataTransport, ExpectedMessage, PartShape, RowMessage, Tag

LEFT_OUT = 5
"""One of this many steps is a warm-up step, which does not count."""
LIMIT_S = 120.0
"""Default of ``--deadline``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The steps of all ranks. Every size has two runs: the transport alone, then exchanges."""

    shape: Shape
    tokens: tuple[int, ...]
    """Sizes to measure, in rows of each attention rank."""
    repeats: int
    """Measured steps of each run."""
    is_prefill: bool = False
    """Whether rows are prefill rows, so that an expert rank gets only rows for its experts."""
    seed: int = 0

    @property
    def left_out(self) -> int:
        """Warm-up steps of each run."""
        return -(-self.repeats // LEFT_OUT)

    def steps(self, run: int) -> range:
        """Numbers of the steps of a run; size ``i`` has the runs ``2 * i`` and ``2 * i + 1``."""
        each = self.left_out + self.repeats
        return range(1 + run * each, 1 + (run + 1) * each)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Measurements of one rank for each size."""

    us: list[dict[str, list[float]]]
    """Of an attention rank: microseconds of ``wire``, ``dispatch`` and ``combine``, by step; the
    mean of its layers."""
    experts_us: list[list[float]]
    """Of an expert rank: microseconds that its experts took, by exchange."""
    num_bytes: list[dict[str, float]]
    """Of an expert rank: bytes an exchange, of ``dispatch`` and of ``combine``."""


class ExpertLaps:
    """A ``TimingSink`` that records the time of the experts."""

    def __init__(self) -> None:
        self.us: list[float] = []

    def fork(self) -> ExpertLaps:
        return self

    def begin_step(self, header: StepHeader) -> bool:
        return True

    def add(self, name: str, start_ns: int, end_ns: int, place: dict[str, Any]) -> None:
        if name == "experts":
            self.us.append((end_ns - start_ns) / 1e3)

    def flush(self) -> None:
        """Do nothing."""


def measure(plan: Plan, deadline_s: float = LIMIT_S) -> dict[str, dict[str, Any]]:
    """Return the times of a step for each size, over all attention ranks. Raises ``RankError``."""
    shape = plan.shape
    ranks = run_ranks(shape.size, run_rank, plan, Meetings(shape), timeout_s=deadline_s)
    attention, experts = ranks[: shape.attention_ranks], ranks[shape.attention_ranks :]
    return {
        str(tokens): of_size(size, attention, experts) for size, tokens in enumerate(plan.tokens)
    }


def of_size(size: int, attention: Sequence[Sizes], experts: Sequence[Sizes]) -> dict[str, Any]:
    """Combine the measurements of all ranks for one size."""
    times = {
        name: [us for rank in attention for us in rank.us[size][name]]
        for name in ("wire", "dispatch", "combine")
    }
    times["exchange"] = [a + b for a, b in zip(times["dispatch"], times["combine"], strict=True)]
    times["experts"] = [us for rank in experts for us in rank.experts_us[size]]
    return {
        **{f"{name}_us": _summary(values) for name, values in times.items()},
        **{
            f"{name}_bytes": sum(rank.num_bytes[size][name] for rank in experts)
            for name in ("dispatch", "combine")
        },
    }


def _summary(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "p10": ordered[len(ordered) // 10],
        "p99": ordered[math.ceil(0.99 * len(ordered)) - 1],
    }


def run_rank(rank: int, size: int, ports: list[int], plan: Plan, meetings: Meetings) -> Sizes:
    """Run one rank; called by ``run_ranks``."""
    with Connected(plan.shape, rank, ports, meetings) as connected, torch.inference_mode():
        if rank >= plan.shape.attention_ranks:
            return _serve(connected, rank - plan.shape.attention_ranks, plan)
        found = _send(connected, rank, plan)
        meetings.all_served()
        return found


def _send(connected: Connected, rank: int, plan: Plan) -> Sizes:
    """Run the attention side, which sends rows and receives sums."""
    shape, transport = plan.shape, connected.transport
    dispatcher = remote_dispatcher(connected, rank, shape)
    draw = torch.Generator().manual_seed(1000 * plan.seed + rank)
    found = []
    for size, num_rows in enumerate(plan.tokens):
        rows = torch.randn(num_rows, shape.width, generator=draw).to(DTYPE)
        weights, ids = torch.rand(num_rows, shape.num_experts, generator=draw).topk(shape.top_k)
        us: dict[str, list[float]] = {"wire": [], "dispatch": [], "combine": []}
        messages = [RowMessage(r, (ids.to(torch.int32), rows)) for r in range(shape.expert_ranks)]
        part = (PartShape(shape.width, DTYPE),)
        expected = [ExpectedMessage(r, part, (num_rows,)) for r in range(shape.expert_ranks)]
        for step in plan.steps(2 * size):
            transport.begin_step(shape.header(step, num_rows))
            start = perf_counter()
            transport.post(Tag(0, 0, 0, "rows"), messages, sized=False)
            transport.receive(Tag(0, 0, 0, "outputs"), expected, sized=False, must_wait=True)
            us["wire"].append(1e6 * (perf_counter() - start))
        keys = torch.arange(num_rows)
        batch = GivenRows(is_prefill=torch.full((num_rows,), plan.is_prefill), row_key=keys)
        for step in plan.steps(2 * size + 1):
            dispatcher.begin_step(shape.header(step, num_rows, plan.is_prefill), [batch])
            dispatch_s = combine_s = 0.0
            for layer in range(shape.layers):
                start = perf_counter()
                handle = dispatcher.dispatch(Dispatch(layer, 0, rows, ids, weights))
                between = perf_counter()
                dispatcher.combine(handle)
                dispatch_s += between - start
                combine_s += perf_counter() - between
            us["dispatch"].append(1e6 * dispatch_s / shape.layers)
            us["combine"].append(1e6 * combine_s / shape.layers)
        found.append({name: values[plan.left_out :] for name, values in us.items()})
    return Sizes(found, [], [])


def _serve(connected: Connected, device: int, plan: Plan) -> Sizes:
    """Run the expert side until the attention ranks close."""
    shape = plan.shape
    server = idle_server(connected, device, shape)
    found, experts_us = [], []
    for size, num_rows in enumerate(plan.tokens):
        echo = _echo(connected.transport, shape, num_rows)
        for step in plan.steps(2 * size):
            echo(step)
        before = dict(server.counters.num_bytes)
        laps = ExpertLaps()
        server.timer = StepTimer(laps)
        steps = plan.steps(2 * size + 1)
        for step in steps:
            server.run_step(shape.header(step, num_rows, plan.is_prefill))
        experts_us.append(laps.us)
        served = len(steps) * shape.layers
        found.append({k: (n - before[k]) / served for k, n in server.counters.num_bytes.items()})
    wait_for_the_end(connected.transport, shape, plan.steps(2 * len(plan.tokens)).start)
    return Sizes([], experts_us, found)


def _echo(transport: DataTransport, shape: Shape, num_rows: int) -> Callable[[int], None]:
    """Run a step of the transport alone: receive rows of every attention rank, return as many."""
    parts = (PartShape(shape.top_k, torch.int32), PartShape(shape.width, DTYPE))
    ranks = range(shape.attention_ranks)
    expected = [ExpectedMessage(rank, parts, (num_rows, num_rows)) for rank in ranks]
    outputs = torch.ones(num_rows, shape.width, dtype=DTYPE)

    def step(number: int) -> None:
        transport.begin_step(shape.header(number, num_rows))
        transport.receive(Tag(0, 0, 0, "rows"), expected, sized=False, must_wait=True)
        messages = [RowMessage(rank, (outputs,)) for rank in ranks]
        transport.post(Tag(0, 0, 0, "outputs"), messages, sized=False)

    return step


def section(quick: bool) -> str:
    """Return the Markdown section."""
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
            found = measure(Plan(shape=shape, tokens=(num_rows,), repeats=repeats))[str(num_rows)]
            name = f"{transport}, 1 + {expert_ranks} ranks, {num_rows} x {width}"
            rows.append([name, _ms(found["wire_us"]), _ms(found["exchange_us"])])
    head = ["transport, ranks, rows", "transport alone, ms", "dispatch and combine, ms"]
    return (
        "## Dispatch and combine\n\nOne exchange of bfloat16 rows with top-8 of 64 small experts "
        "and one thread in each rank, compared with the transport of the same rows alone. Median "
        f"of {repeats} repeats, and the 10th percentile.\n\n{results.table(head, rows)}"
    )


def _ms(times: Mapping[str, float]) -> str:
    return f"{times['median'] / 1e3:.3f} ({times['p10'] / 1e3:.3f})"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dispatch", description=__doc__)
    for name, default, what in (
        ("--num-attention-workers", 1, "processes that send rows"),
        ("--num-expert-workers", 2, "processes that send them back"),
        ("--hidden", 2048, "numbers in a row, bfloat16"),
        ("--num-experts", 64, "in equal parts on the expert workers"),
        ("--top-k", 8, "experts of a row"),
        ("--layers", 8, "exchanges of a step"),
        ("--repeats", 200, "steps of each size"),
    ):
        parser.add_argument(
            name, type=count, default=default, metavar="N", help=f"{what} ({default})"
        )
    parser.add_argument(
        "--tokens",
        type=counts,
        default=(1, 16, 64),
        metavar="T,T",
        help="rows of each attention worker in a step (1,16,64)",
    )
    parser.add_argument(
        "--prefill", action="store_true", help="prompt rows: workers get only what they need"
    )
    parser.add_argument(
        "--transport", choices=("sockets", "collective"), default="sockets", help="(sockets)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of rows and experts (0)")
    parser.add_argument(
        "--deadline", type=float, default=LIMIT_S, metavar="S", help=f"for all steps ({LIMIT_S:g})"
    )
    add_output(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all sizes and print the times of a step for each."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.top_k > args.num_experts:
        parser.error(f"--top-k is at most --num-experts ({args.num_experts})")
    if args.num_expert_workers > args.num_experts:
        parser.error(f"--num-expert-workers is at most --num-experts ({args.num_experts})")
    shape = Shape(
        attention_ranks=args.num_attention_workers,
        expert_ranks=args.num_expert_workers,
        width=args.hidden,
        num_experts=args.num_experts,
        top_k=args.top_k,
        max_rows=max(args.tokens),
        transport=args.transport,
        layers=args.layers,
    )
    plan = Plan(
        shape=shape,
        tokens=args.tokens,
        repeats=args.repeats,
        is_prefill=args.prefill,
        seed=args.seed,
    )
    note(f"{shape.attention_ranks} + {shape.expert_ranks} processes")
    found = measure(plan, args.deadline)
    names = ("num_attention_workers", "num_expert_workers", "hidden", "num_experts", "top_k")
    more = ("layers", "repeats", "prefill", "transport", "seed")
    options = {name: getattr(args, name) for name in (*names, *more)}
    document = document_of("benchmarks.dispatch", options, {"tokens": found})
    show_and_save(args, document, _text(document["results"]["tokens"]))
    if not args.json:
        note("US: microseconds, median (p99); combine waits for the experts.")
        note("BYTES: sums over all workers.")
    return 0


def _text(found: Mapping[str, Any]) -> str:
    times = {"wire": "WIRE US", "dispatch": "DISPATCH US", "combine": "COMBINE US"}
    times |= {"exchange": "BOTH US", "experts": "EXPERTS US"}
    rows = [
        (
            tokens,
            *(
                f"{format_number(numbers[f'{name}_us']['median'], 0)} "
                f"({format_number(numbers[f'{name}_us']['p99'], 0)})"
                for name in times
            ),
            *(format_number(numbers[f"{name}_bytes"], 0) for name in ("dispatch", "combine")),
        )
        for tokens, numbers in found.items()
    ]
    return table(("TOKENS", *times.values(), "BYTES OUT", "BYTES BACK"), rows)
