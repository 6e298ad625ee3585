"""How close the engine and its workers come to what the machine allows, row by row.

python -m benchmarks.memory_wall [--rows decode,prefill] [--folder FOLDER] [--cores N]

Each row measures a number and its bound in turns, in the same process or beside it, so that other
load on the machine hits both alike. Models are random OLMoEs in bfloat16, but for ``quantized``
(int8 and int4 too) and ``stored`` (experts in float8 and MXFP4). ``whole`` needs 14 GB of disk and
16 GB of memory, and runs only where it is named. The comparison with other engines is
``benchmarks.peers``. The result is a Markdown section.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.memory_wall import engine as wall_engine
from benchmarks.memory_wall import quantized as wall_quantized
from benchmarks.memory_wall import workers as wall_workers
from benchmarks.memory_wall.rows import MINI, Bench, Row, report
from benchmarks.report import results
from benchmarks.run import terminate
from cluster.cli.terminal.arguments import count

logger = logging.getLogger(__name__)

ROWS = {**wall_engine.ROWS, **wall_quantized.ROWS, **wall_workers.ROWS}
"""By the names of ``--rows``, in the order of the table."""
_BY_DEFAULT = tuple(name for name in ROWS if name != "whole")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory_wall",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--rows",
        type=_names,
        default=_BY_DEFAULT,
        metavar="ROW,ROW",
        help=f"of {','.join(ROWS)} (all but whole)",
    )
    text = "where random checkpoints stay, up to 20 GB of them (a temporary one)"
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help=text)
    parser.add_argument("--repeats", type=count, default=5, metavar="N", help="medians of (5)")
    parser.add_argument("--cores", type=count, metavar="N", help="use so many (all)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that all runs")
    return parser


def _names(text: str) -> tuple[str, ...]:
    """``decode,prefill``. Raises ``ArgumentTypeError``."""
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := sorted(set(names) - set(ROWS)):
        raise argparse.ArgumentTypeError(f"{unknown[0]} is not one of {', '.join(ROWS)}")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and print the section."""
    args = make_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("workers").setLevel(logging.WARNING)
    handler = signal.signal(signal.SIGTERM, terminate)
    before = os.sched_getaffinity(0)
    cores = sorted(before)[: args.cores]
    os.sched_setaffinity(0, cores)  # all that is started inherits it
    try:
        rows = measure(args, len(cores))
    finally:
        os.sched_setaffinity(0, before)
        signal.signal(signal.SIGTERM, handler)
    command = " ".join(["python -m benchmarks.memory_wall", *(arguments or sys.argv[1:])])
    sys.stdout.write(f"{_words(args, len(cores))}\n\n{report(rows)}\n\n")
    sys.stdout.write(f"{results.machine(command)}\n")
    return 0


def measure(args: argparse.Namespace, num_cores: int) -> list[Row]:
    """The rows, one after the other."""
    found: list[Row] = []
    with ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bench = Bench(folder=folder, repeats=args.repeats, cores=num_cores, is_tiny=args.tiny)
        for name in args.rows:
            start = time.monotonic()
            rows = ROWS[name](bench)
            found += rows
            logger.info("%s took %.0f s\n%s", name, time.monotonic() - start, report(rows))
    return found


def _words(args: argparse.Namespace, num_cores: int) -> str:
    return (
        "## Memory wall\n\nRandom OLMoE in bfloat16: unless a row says otherwise, hidden "
        f"{MINI.hidden}, {MINI.layers} layers, {MINI.experts} experts top-{MINI.top_k}, ffn "
        f"{MINI.ffn}, vocabulary {MINI.vocab}; {num_cores} cores, prompts of 128 random tokens and "
        "64 new ones, greedy. Bounds of decode rates: the weights of a step, codes with their "
        "scales, read once at the rate that all cores (with two workers: one core, as they read in "
        "turns) read memory with; of prefill: the operations of the products and of attention at "
        "the rate of a large product; "
        "of loading: reading the same files. Two workers at most use (Ta + Te) / (2 max(Ta, Te)) "
        "of their cores, Ta and Te being the times of a step's parts in one process with one "
        f"thread and as many micro-batches. Medians of {args.repeats} repeats, number and bound in "
        "turns; ratios are medians of the ratios within a repeat. Where no bound comes from the "
        "machine it is the largest value that is asked for."
    )
