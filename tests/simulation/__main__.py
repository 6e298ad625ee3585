"""Runs seeds from the command line; see the package."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

from tests.simulation.bugs import BUGS
from tests.simulation.faults import KINDS, LARGE_KINDS
from tests.simulation.kernel import Kernel
from tests.simulation.scenario import draw_scenario, enlarged
from tests.simulation.shrinking import describe, outcome_of, shrink
from tests.simulation.world import World

_CHUNK_SEEDS = 4
"""Seeds that a process takes at a time."""


@dataclass(kw_only=True, slots=True)
class Report:
    """What became of one seed, or of many."""

    num_seeds: int = 1
    num_failed: int = 0
    text: str = ""
    """What is broken in one seed; empty if nothing is."""
    num_requests: int = 0
    num_steps: int = 0
    """Committed steps."""
    num_events: int = 0
    cpu_s: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    """How many of each kind."""
    features: Counter[str] = field(default_factory=Counter)
    """How often each occurred."""

    def add(self, other: Report) -> None:
        """Count those of another report, too."""
        self.num_seeds += other.num_seeds
        self.num_failed += other.num_failed
        self.num_requests += other.num_requests
        self.num_steps += other.num_steps
        self.num_events += other.num_events
        self.cpu_s += other.cpu_s
        self.faults += other.faults
        self.features += other.features

    def __str__(self) -> str:
        return (
            f"{self.num_seeds} seeds, {self.num_failed} failed, "
            f"{self.cpu_s / max(self.num_seeds, 1):.3f} CPU seconds each\n"
            f"{self.num_steps} committed steps, {self.num_requests} requests, "
            f"{self.num_events} events\n"
            f"{self.faults.total()} faults: {_counts(self.faults)}\n"
            f"features: {_counts(self.features)}"
        )


def _counts(found: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(found.items()))


class _VirtualTime(logging.Handler):
    """Prints what product code logs, with the simulation's time and process."""

    def emit(self, record: logging.LogRecord) -> None:
        if Kernel.current is not None:
            text = record.getMessage()
            if record.exc_info is not None and record.exc_info[1] is not None:
                text += "\n" + "".join(traceback.format_exception(record.exc_info[1]))
            Kernel.current.log("%s", text)


def run_seed(seed: int, options: argparse.Namespace) -> Report:
    """Live through one seed, and shrink its failure if asked."""
    bug = BUGS.get(options.bug)
    usual = LARGE_KINDS if options.members else KINDS
    kinds = tuple(options.kinds.split(",")) if options.kinds else bug.kinds if bug else usual
    began = time.process_time()
    needed = tuple(filter(None, options.features.split(",")))
    scenario = draw_scenario(seed, kinds, bug.features if bug is not None else None, needed)
    if options.members:
        attention, _, experts = options.members.partition("+")
        scenario = enlarged(scenario, int(attention), int(experts))
    world = World(scenario, print if options.verbose else None)
    with bug.plant() if bug is not None else nullcontext():
        text = outcome_of(world)
        if text and options.shrink:
            scenario, text = shrink(scenario, text)
            text += "\n" + describe(scenario)
    if not text and bug is None:
        small = [f"{n} {what}" for what, (n, least) in world.sizes().items() if n < least]
        text = ", ".join(small) and f"only {', '.join(small)}"
    return Report(
        num_failed=int(bool(text)),
        text=text and f"seed {seed}: {text}",
        num_requests=len(world.clients.outcomes),
        num_steps=world.highest_step,
        num_events=world.kernel.num_events,
        cpu_s=time.process_time() - began,
        faults=Counter(fault.kind for fault in scenario.faults),
        features=world.occurred,
    )


def run_seeds(options: argparse.Namespace) -> Iterator[Report]:
    """The reports of all seeds, in their order, from ``options.jobs`` processes."""
    seeds = range(options.seed, options.seed + options.num)
    run = partial(run_seed, options=options)
    if options.jobs <= 1:
        yield from map(run, seeds)
        return
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        yield from pool.imap(run, seeds, _CHUNK_SEEDS)


def main() -> int:
    """Run seeds; the exit code is 1 when one fails, or when none finds the planted bug."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--num", type=int, help="how many; by default 1, of a bug all of its own")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--members",
        default="",
        metavar="A+E",
        help="attention and expert workers of each seed, in place of a few",
    )
    parser.add_argument("--kinds", default="", help="faults to draw from, by default all")
    parser.add_argument("--features", default="", help="features that every seed has")
    parser.add_argument("--bug", default="", choices=["", *BUGS], help="a planted bug")
    parser.add_argument("--shrink", action="store_true", help="drop what a failure does not need")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    if options.num is None:
        options.num = BUGS[options.bug].num_seeds if options.bug else 1
    if options.verbose:
        logging.basicConfig(level=logging.INFO, handlers=[_VirtualTime()])
    total = Report(num_seeds=0)
    for report in run_seeds(options):
        total.add(report)
        if report.text:
            print(report.text, flush=True)
            if options.bug:
                return 0
    print(total)
    return 1 if total.num_failed or options.bug else 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # sets of strings have the same order every time
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])
    sys.exit(main())
