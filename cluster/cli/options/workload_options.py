"""Command-line options that describe requests and their arrival times."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from cluster.cli.terminal.arguments import count, positive, positive_or_inf
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.workload.arrivals import Arrival, poisson, read_trace
from cluster.workload.tally import MEASURES

_NUM_PROMPTS = 100
_AT_ONCE = 256
"""Maximum number of concurrent requests if all are sent at once: servers limit each API key."""
_TRACE = "File of arrival times and lengths: JSON lines in Mooncake's format, .csv in Azure's"


def add_arrival_options(parser: argparse.ArgumentParser, trace: str = _TRACE) -> None:
    """Add the options that ``make_arrivals`` and ``max_concurrency`` read.

    ``trace``: help of ``--trace``.
    """
    text = f"Number of requests (default: {_NUM_PROMPTS}, or all of the trace)"
    parser.add_argument("--num-prompts", type=count, help=text)
    text = "Mean requests per second with Poisson arrivals; inf sends all at once"
    parser.add_argument(
        "--request-rate", type=positive_or_inf, default=math.inf, metavar="NUMBER", help=text
    )
    parser.add_argument("--trace", type=Path, metavar="FILE", help=trace)
    for name, text in (
        ("speed", "Factor by which requests arrive faster than in the trace"),
        ("length", "Factor by which prompts and outputs are longer than in the trace"),
    ):
        parser.add_argument(
            f"--trace-{name}", type=positive, default=1.0, metavar="NUMBER", help=text
        )
    text = f"Maximum concurrent requests (default: {_AT_ONCE} if all are sent at once, else any)"
    parser.add_argument("--max-concurrency", type=count, help=text)
    for name, default, what in (("input", 128, "prompt"), ("output", 64, "output")):
        text = f"Number of tokens of each {what}, without a trace"
        parser.add_argument(f"--random-{name}-len", type=count, default=default, help=text)
    text = "Seed of the random prompts and arrival times"
    parser.add_argument("--seed", type=int, default=0, help=text)
    text = f"Limits in ms on {', '.join(MEASURES)}; shows the rate of requests that meet all"
    parser.add_argument(
        "--goodput", nargs="+", type=_goal, default=[], metavar="NAME:MS", help=text
    )


def _goal(text: str) -> tuple[str, float]:
    name, _, value = text.partition(":")
    try:
        goal = float(value)
    except ValueError:
        goal = 0.0
    if name not in MEASURES or not goal > 0:
        raise argparse.ArgumentTypeError(f"must be {'|'.join(MEASURES)}:MS")
    return name, goal


def max_concurrency(args: argparse.Namespace) -> int | None:
    """Return the maximum number of concurrent requests; None without a limit."""
    is_at_once = args.trace is None and not math.isfinite(args.request_rate)
    limit: int | None = args.max_concurrency or (_AT_ONCE if is_at_once else None)
    return limit


def make_arrivals(args: argparse.Namespace) -> list[Arrival]:
    """Make or read the requests. Raises ``CommandError`` for an invalid trace."""
    if args.trace is None:
        lengths = args.random_input_len, args.random_output_len
        number = args.num_prompts or _NUM_PROMPTS
        return poisson(number, args.request_rate, *lengths, args.seed)
    if math.isfinite(args.request_rate):
        raise CommandError(ExitCode.USAGE, "give --request-rate or --trace, not both")
    try:
        return read_trace(
            args.trace, args.num_prompts, speed=args.trace_speed, length=args.trace_length
        )
    except (OSError, ValueError) as err:
        reason = err.strerror if isinstance(err, OSError) else str(err)
        raise CommandError(
            ExitCode.USAGE, f"--trace ({args.trace}) cannot be read: {reason}"
        ) from err
