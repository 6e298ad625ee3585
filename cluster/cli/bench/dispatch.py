"""``bench dispatch``: one exchange of rows over the data plane, between processes of this host."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cluster.cli.bench.document import add_save, count, counts, document_of, shown, tell
from cluster.cli.exit_codes import CommandError, ExitCode
from cluster.cli.terminal import note, table

if TYPE_CHECKING:
    from cluster.cli.bench.exchange import Plan, Sizes

LIMIT_S = 120.0
"""Of all steps, where ``--timeout`` sets none."""


def add_command(kinds: Any, common: argparse.ArgumentParser) -> None:
    """Register ``bench dispatch``."""
    parser = kinds.add_parser(
        "dispatch", parents=[common], help="rows to idle experts and back, between processes here"
    )
    for name, default, what in (
        ("--num-attention-workers", 1, "processes that send rows"),
        ("--num-expert-workers", 2, "processes that send them back"),
        ("--hidden", 2048, "numbers in a row, bfloat16"),
        ("--num-experts", 64, "in equal parts on the expert workers"),
        ("--top-k", 8, "experts of a row"),
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
    add_save(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run all sizes and tell what a step of each took."""
    if not args.top_k <= args.num_experts:
        raise CommandError(ExitCode.USAGE, f"--top-k is at most --num-experts ({args.num_experts})")
    if not args.num_expert_workers <= args.num_experts:
        message = f"--num-expert-workers is at most --num-experts ({args.num_experts})"
        raise CommandError(ExitCode.USAGE, message)
    found = measure(_plan(args), args.timeout or LIMIT_S)
    names = ("num_attention_workers", "num_expert_workers", "hidden", "num_experts", "top_k")
    more = ("repeats", "prefill", "transport", "seed")
    options = {name: getattr(args, name) for name in (*names, *more)}
    document = document_of("dispatch", options, {"tokens": found})
    tell(args, document, _text(document["results"]["tokens"]))
    if not args.json:
        note("MICROSECONDS: median (p99); combine waits for the experts. BYTES: of all workers.")
    return ExitCode.OK


def _plan(args: argparse.Namespace) -> Plan:
    from cluster.cli.bench.exchange import Plan
    from cluster.cli.bench.idle_ranks import Shape

    shape = Shape(
        attention_ranks=args.num_attention_workers,
        expert_ranks=args.num_expert_workers,
        width=args.hidden,
        num_experts=args.num_experts,
        top_k=args.top_k,
        max_rows=max(args.tokens),
        transport=args.transport,
    )
    return Plan(
        shape=shape,
        tokens=args.tokens,
        repeats=args.repeats,
        is_prefill=args.prefill,
        seed=args.seed,
    )


def measure(plan: Plan, timeout_s: float) -> dict[str, Any]:
    """By size, what a step took, over all attention ranks. Raises ``CommandError``."""
    from cluster.cli.bench.exchange import run_rank
    from cluster.cli.bench.idle_ranks import Meetings
    from cluster.cli.bench.ranks import RankError, run_ranks

    shape = plan.shape
    note(f"{shape.attention_ranks} + {shape.expert_ranks} processes")
    try:
        ranks = run_ranks(shape.size, run_rank, plan, Meetings(shape), timeout_s=timeout_s)
    except RankError as err:
        raise CommandError(ExitCode.FAILED, str(err)) from err
    attention, experts = ranks[: shape.attention_ranks], ranks[shape.attention_ranks :]
    return {
        str(tokens): _of_size(size, attention, experts) for size, tokens in enumerate(plan.tokens)
    }


def _of_size(size: int, attention: Sequence[Sizes], experts: Sequence[Sizes]) -> dict[str, Any]:
    spans = {
        name: [us for rank in attention for us in rank.us[size][name]]
        for name in ("dispatch", "combine")
    }
    spans["exchange"] = [a + b for a, b in zip(spans["dispatch"], spans["combine"], strict=True)]
    return {
        **{f"{name}_us": _summary(values) for name, values in spans.items()},
        **{
            f"{name}_bytes": sum(rank.num_bytes[size][name] for rank in experts)
            for name in ("dispatch", "combine")
        },
    }


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "p99": sorted(values)[math.ceil(0.99 * len(values)) - 1],
    }


def _text(found: Mapping[str, Any]) -> str:
    header = ("TOKENS", "DISPATCH US", "COMBINE US", "BOTH US", "BYTES OUT", "BYTES BACK")
    rows = [
        (
            tokens,
            *(
                f"{shown(numbers[f'{name}_us']['median'], 0)} "
                f"({shown(numbers[f'{name}_us']['p99'], 0)})"
                for name in ("dispatch", "combine", "exchange")
            ),
            *(shown(numbers[f"{name}_bytes"], 0) for name in ("dispatch", "combine")),
        )
        for tokens, numbers in found.items()
    ]
    return table(header, rows)
