"""``make bench``: run all benchmarks and write their pages in ``docs/results``.

python -m benchmarks.run [--quick] [--only serving,dispatch] [--out FOLDER]

A benchmark is a module with ``section(quick: bool) -> str``, which returns its section of a page.
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
    "serving": ("serving.throughput", "serving"),
    "families": ("serving.families", "serving"),
    "colocated": ("serving.colocated", "serving"),
    "micro_batches": ("serving.micro_batches", "engine"),
    "prefix_cache": ("engine.prefix_cache", "cache"),
    "speculation": ("engine.speculation", "speculation"),
    "acceptance": ("engine.acceptance", "speculation"),
    "itl_target": ("serving.itl_target", "engine"),
    "deterministic": ("serving.deterministic", "serving"),
    "dispatch": ("engine.dispatch", "engine"),
    "idle": ("serving.idle", "engine"),
    "load_tracking": ("engine.load_tracking", "engine"),
    "step_cost": ("engine.step_cost", "engine"),
    "kv_cache": ("engine.kv_cache", "engine"),
    "kv_accuracy": ("engine.kv_accuracy", "engine"),
    "perplexity": ("engine.perplexity", "quantization"),
    "delta_net": ("engine.delta_net", "memory-wall"),
    "moves": ("faults.moves", "reliability"),
    "scaling": ("faults.scaling", "reliability"),
    "overload": ("serving.overload", "gateway"),
    "placement": ("placement.quality", "placement"),
    "rebalancing": ("placement.rebalancing", "placement"),
    "routing": ("simulated.routing", "cache"),
    "retention": ("simulated.retention", "cache"),
    "sessions": ("simulated.sessions", "cache"),
    "kv_routing": ("serving.kv_routing", "cache"),
    "sessions_served": ("serving.sessions_served", "cache"),
    "autoscaling": ("simulated.autoscaling", "placement"),
    "gateway_cost": ("serving.gateway_cost", "gateway"),
    "watching": ("serving.watching", "gateway"),
}
"""Section -> its module here, which has a ``section``, and its page in ``docs/results``."""


def run(names: Sequence[str], quick: bool, out: Path | None, command: str) -> None:
    """Run benchmarks one after the other; each is written as soon as it is done."""
    for name in names:
        start = time.monotonic()
        module, page = SECTIONS[name]
        body: str = importlib.import_module(f"benchmarks.{module}").section(quick)
        body = f"{body}\n\n{results.machine(command)}"
        logger.info("%s took %.0f s", name, time.monotonic() - start)
        if out is None:
            sys.stdout.write(f"{body}\n\n")
        else:
            results.write_section(out / f"{page}.md", name, body)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to stdout")
    parser.add_argument("--only", default=",".join(SECTIONS), help="benchmarks, with commas")
    parser.add_argument("--out", type=Path, help="folder to write, by default docs/results")
    options = parser.parse_args(arguments)
    names = options.only.split(",")
    unknown = sorted(set(names) - SECTIONS.keys())
    if unknown:
        parser.error(f"--only: {unknown[0]} is not one of {', '.join(SECTIONS)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    signal.signal(signal.SIGTERM, terminate)
    out = options.out or (None if options.quick else results.FOLDER)
    command = " ".join(["python -m benchmarks.run", *(arguments or sys.argv[1:])])
    run(names, options.quick, out, command)


def terminate(number: int, frame: FrameType | None) -> None:
    """End as on SIGINT: what was started is ended, what was written is removed."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    main()
