"""Speed of the engine and its workers compared with the bounds that the machine sets.

python -m benchmarks.memory_wall [--rows decode,prefill] [--folder FOLDER] [--cores N]

Each row measures a number and its bound in turns, so that other load on the machine affects both
alike. The models are random OLMoEs in bfloat16; ``quantized`` also measures int8 and int4, and
``stored`` measures experts in float8 and MXFP4. ``whole`` needs 14 GB of disk and 16 GB of memory,
and runs only if it is named. ``benchmarks.peers`` compares the engine with other engines. The
output is a Markdown section.
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
"""Name in ``--rows`` -> function that measures the rows, in the order of the table."""
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
        help=f"of {','.join(ROWS)} (all except whole)",
    )
    text = "folder of the random checkpoints, up to 20 GB (a temporary one)"
    parser.add_argument("--folder", type=Path, metavar="FOLDER", help=text)
    parser.add_argument(
        "--repeats",
        type=count,
        default=5,
        metavar="N",
        help="measurements of each row, whose medians are shown (5)",
    )
    parser.add_argument("--cores", type=count, metavar="N", help="cores to use (all)")
    parser.add_argument(
        "--tiny", action="store_true", help="a tiny model, to check that all rows run"
    )
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
    """Measure the rows in order."""
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
        f"## Memory wall\n\nThe model is a random OLMoE in bfloat16 with hidden {MINI.hidden}, "
        f"{MINI.layers} layers, {MINI.experts} experts top-{MINI.top_k}, ffn {MINI.ffn} and "
        f"vocabulary {MINI.vocab}, unless a row names another one. It runs on {num_cores} cores "
        "with prompts of 128 random tokens, 64 new tokens and greedy sampling. Bounds: a decode "
        "step reads its weights (quantized weights with their scales) once, at the rate at which "
        "all cores read memory; with 1 + 1 workers at the rate of one core, as they read in turns. "
        "A prefill runs its operations at the rate of a large matrix product. Loading takes as "
        "long as reading the files. 1 + 1 workers use at most (Ta + Te) / (2 max(Ta, Te)) of their "
        "cores, where Ta and Te are the times of attention and experts in a step on one thread. "
        "The memory of a worker is its weights, the KV cache and a constant. In the other rows the "
        "bound is the largest allowed value. Peak memory is measured once. Other values are "
        f"medians of {args.repeats} repeats; a ratio is the median of the ratios within a repeat. "
        "Goals: the required ratio, and the ratio aimed at."
    )
