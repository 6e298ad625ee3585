"""Check the GPU path on one GPU: ``python -m benchmarks.gpu_check --out DIR [--only NAMES]``.

Every section runs in a separate process with a part of the time budget, prints one line when it has
ended, and appends its results to ``DIR/gpu_check.jsonl``; the output of its process is in
``DIR/SECTION.log``. Sections about correctness run in parallel if there are enough cores. The exit
code is 1 if one of them fails or the budget has no time for it. Without a GPU, or with ``--device
cpu``, only the sections run that need no GPU.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu_check.runner import FILE, Settings, exit_code, run, summary
from benchmarks.gpu_check.section import Section
from benchmarks.gpu_check.sections import SECTIONS
from cluster.cli.terminal.arguments import count
from cluster.cli.terminal.output import note, write_line

_MOST_JOBS = 12


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--budget", type=count, default=570, metavar="SECONDS", help="of all sections (570)"
    )
    text = "for what is found (gpu-check)"
    parser.add_argument("--out", type=Path, default=Path("gpu-check"), metavar="DIR", help=text)
    parser.add_argument(
        "--only",
        type=_chosen,
        default=tuple(s for s in SECTIONS if not s.only_by_name),
        metavar="NAME,NAME",
        help=f"sections, or beginnings of their names, of {','.join(s.name for s in SECTIONS)}",
    )
    parser.add_argument(
        "--jobs",
        type=count,
        default=min(_MOST_JOBS, max((os.cpu_count() or 1) // 2, 1)),
        metavar="NUMBER",
        help="sections about correctness that run side by side (half of the cores, 12 at most)",
    )
    devices = ("auto", "cuda", "cpu")
    parser.add_argument("--device", choices=devices, default="auto", help="where it runs (auto)")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that all runs")
    return parser


def _chosen(text: str) -> tuple[Section, ...]:
    """Parse names such as ``operators,speed`` into sections. Raises ``ArgumentTypeError``."""
    words = text.split(",")
    known = {name for s in SECTIONS for name in (s.name, s.name.split("-")[0])}
    if unknown := sorted(set(words) - known):
        names = ", ".join(s.name for s in SECTIONS)
        raise argparse.ArgumentTypeError(f"{unknown[0]} is not one of {names}")
    return tuple(s for s in SECTIONS if {s.name, s.name.split("-")[0]} & set(words))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections; returns 1 if one about correctness fails or has no time."""
    args = make_parser().parse_args(arguments)
    has_gpu = torch.cuda.is_available()
    if args.device == "cuda" and not has_gpu:
        raise SystemExit("--device cuda: torch finds no GPU")
    device = "cuda:0" if has_gpu and args.device != "cpu" else "cpu"
    settings = Settings(
        budget_s=args.budget, out=args.out, device=device, is_tiny=args.tiny, jobs=args.jobs
    )
    note(f"{len(args.only)} sections on {device}, {args.budget} s at most")
    outcomes = run(args.only, settings)
    write_line(f"\n{summary(outcomes)}")
    note(f"wrote {args.out / FILE}")
    return exit_code(outcomes)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the section, too
    sys.exit(main())
