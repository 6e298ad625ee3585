"""``make bench``: run all benchmarks and write ``RESULTS.md``.

python -m benchmarks.run [--quick] [--only serving,dispatch] [--out FILE]

A benchmark is a module with ``section(quick: bool) -> str``, which returns its part of the file.
``--quick`` shows that everything runs; its numbers mean nothing and go to stdout.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from benchmarks.report import results

logger = logging.getLogger(__name__)

SECTIONS = {
    "serving": "serving.throughput",
    "families": "serving.families",
    "colocated": "serving.colocated",
    "micro_batches": "serving.micro_batches",
    "prefix_cache": "engine.prefix_cache",
    "speculation": "engine.speculation",
    "acceptance": "engine.acceptance",
    "itl_target": "serving.itl_target",
    "deterministic": "serving.deterministic",
    "dispatch": "engine.dispatch",
    "idle": "serving.idle",
    "load_tracking": "engine.load_tracking",
    "step_cost": "engine.step_cost",
    "kv_cache": "engine.kv_cache",
    "kv_accuracy": "engine.kv_accuracy",
    "perplexity": "engine.perplexity",
    "delta_net": "engine.delta_net",
    "moves": "faults.moves",
    "scaling": "faults.scaling",
    "overload": "serving.overload",
    "placement": "placement.quality",
    "rebalancing": "placement.rebalancing",
    "routing": "simulated.routing",
    "retention": "simulated.retention",
    "sessions": "simulated.sessions",
    "kv_routing": "serving.kv_routing",
    "sessions_served": "serving.sessions_served",
    "autoscaling": "simulated.autoscaling",
    "gateway_cost": "serving.gateway_cost",
    "watching": "serving.watching",
}
"""Section -> its module here, which has a ``section``, in the order of the file."""


def run(names: Sequence[str], quick: bool, out: Path | None, command: str) -> None:
    """Run benchmarks one after the other; each is written as soon as it is done."""
    for name in names:
        start = time.monotonic()
        body: str = importlib.import_module(f"benchmarks.{SECTIONS[name]}").section(quick)
        body = f"{body}\n\n{results.machine(command)}"
        logger.info("%s took %.0f s", name, time.monotonic() - start)
        if out is None:
            sys.stdout.write(f"{body}\n\n")
        else:
            results.write_section(out, name, body)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to stdout")
    parser.add_argument("--only", default=",".join(SECTIONS), help="benchmarks, with commas")
    parser.add_argument("--out", type=Path, help=f"file to write, by default {results.FILE.name}")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    unknown = sorted(set(names) - SECTIONS.keys())
    if unknown:
        parser.error(f"--only: {unknown[0]} is not one of {', '.join(SECTIONS)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, terminate)
    out = options.out or (None if options.quick else results.FILE)
    command = " ".join(["python -m benchmarks.run", *(arguments or sys.argv[1:])])
    run(names, options.quick, out, command)


def terminate(number: int, frame: FrameType | None) -> None:
    """End as on SIGINT: what was started is ended, what was written is removed."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
