"""Command-line options that describe a workload, and the workload made from the options."""

from __future__ import annotations

import argparse
import math
from typing import Any

from cluster.cli.bench.workload import Workload
from cluster.cli.options.workload_options import (
    add_arrival_options,
    make_arrivals,
    max_concurrency,
)
from cluster.cli.terminal.arguments import add_model_option, count

LIMIT_S = 600.0
"""Time limit of one request without ``--timeout``, in seconds."""


def add_workload_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of requests and arrival times, which ``make_workload`` reads."""
    add_model_option(parser)
    add_arrival_options(parser)
    text = "Vocabulary size for random prompts (default: as the server reports)"
    parser.add_argument("--vocab-size", type=count, help=text)


def make_workload(args: argparse.Namespace, vocab_size: int) -> Workload:
    """Make the workload from the options. Raises ``CommandError`` for an invalid trace."""
    return Workload(
        arrivals=make_arrivals(args),
        max_concurrency=max_concurrency(args),
        vocab_size=vocab_size,
        seed=args.seed,
        timeout_s=args.timeout or LIMIT_S,
    )


def options_of(args: argparse.Namespace, load: Workload) -> dict[str, Any]:
    """Return the settings of a workload that a saved document lists."""
    settings: dict[str, Any] = {
        "num_prompts": len(load.arrivals),
        "max_concurrency": load.max_concurrency,
        "vocab_size": load.vocab_size,
        "seed": load.seed,
        "timeout_s": load.timeout_s,
        "goodput_ms": dict(args.goodput),
    }
    if args.trace is not None:
        speed, length = args.trace_speed, args.trace_length
        return {**settings, "trace": args.trace.name, "speed": speed, "length": length}
    rate = args.request_rate if math.isfinite(args.request_rate) else None
    lengths = {"input_len": args.random_input_len, "output_len": args.random_output_len}
    return {**settings, "request_rate": rate, **lengths}
