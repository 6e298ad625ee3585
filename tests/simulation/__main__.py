"""Runs seeds from the command line; see the package."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback
from contextlib import nullcontext

from tests.simulation.bugs import BUGS
from tests.simulation.faults import KINDS
from tests.simulation.kernel import Kernel
from tests.simulation.scenario import draw_scenario
from tests.simulation.shrinking import describe, outcome_of, shrink
from tests.simulation.world import World


class _VirtualTime(logging.Handler):
    """Prints what product code logs, with the simulation's time and process."""

    def emit(self, record: logging.LogRecord) -> None:
        if Kernel.current is not None:
            text = record.getMessage()
            if record.exc_info is not None and record.exc_info[1] is not None:
                text += "\n" + "".join(traceback.format_exception(record.exc_info[1]))
            Kernel.current.log("%s", text)


def main() -> int:
    """Run seeds; the exit code is 1 when one fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, default=1)
    parser.add_argument("--kinds", default="", help="faults to draw from, by default all")
    parser.add_argument("--bug", default="", choices=["", *BUGS], help="a planted bug")
    parser.add_argument("--shrink", action="store_true", help="drop what a failure does not need")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    if options.verbose:
        logging.basicConfig(level=logging.INFO, handlers=[_VirtualTime()])
    failed = 0
    bug = BUGS.get(options.bug)
    began = time.process_time()
    steps = events = 0
    for seed in range(options.seed, options.seed + options.num):
        kinds = tuple(options.kinds.split(",")) if options.kinds else KINDS
        if bug is not None and not options.kinds:
            kinds = bug.kinds
        scenario = draw_scenario(seed, kinds)
        world = World(scenario, print if options.verbose else None)
        with bug.plant() if bug is not None else nullcontext():
            found = outcome_of(world)
            if found and options.shrink:
                scenario, found = shrink(scenario, found)
                found += "\n" + describe(scenario)
        if found:
            failed += 1
            print(f"seed {seed}: {found}", flush=True)
        if found and options.bug:
            return 0
        steps += world.highest_step
        events += world.kernel.num_events
    took = time.process_time() - began
    print(
        f"{options.num} seeds, {failed} failed, {took / options.num:.3f} CPU seconds, "
        f"{steps / options.num:.0f} steps and {events / options.num:.0f} events each"
    )
    return 1 if failed or options.bug else 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # sets of strings have the same order every time
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])
    sys.exit(main())
