"""Runs seeds from the command line; see the package."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import traceback

from tests.simulation.faults import KINDS
from tests.simulation.kernel import Kernel
from tests.simulation.scenario import draw_scenario
from tests.simulation.world import Broken, World


class _VirtualTime(logging.Handler):
    """Prints what product code logs, with the simulation's time and process."""

    def emit(self, record: logging.LogRecord) -> None:
        if Kernel.current is not None:
            text = record.getMessage()
            if record.exc_info is not None and record.exc_info[1] is not None:
                text += f": {record.exc_info[1]!r}"
            Kernel.current.log("%s", text)


def main() -> int:
    """Run seeds; the exit code is 1 when one fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num", type=int, default=1)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    if options.verbose:
        logging.basicConfig(level=logging.INFO, handlers=[_VirtualTime()])
    failed = 0
    began = time.process_time()
    steps = events = 0
    for seed in range(options.seed, options.seed + options.num):
        scenario = draw_scenario(seed, KINDS)
        world = World(scenario, print if options.verbose else None)
        try:
            world.run()
        except Broken as err:
            failed += 1
            print(f"seed {seed}: {err}")
        except Exception:
            failed += 1
            print(f"seed {seed}:")
            traceback.print_exc()
        steps += world.highest_step
        events += world.kernel.num_events
    took = time.process_time() - began
    print(
        f"{options.num} seeds, {failed} failed, {took / options.num:.3f} CPU seconds, "
        f"{steps / options.num:.0f} steps and {events / options.num:.0f} events each"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # sets of strings have the same order every time
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])
    sys.exit(main())
