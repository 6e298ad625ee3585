"""Drops faults and requests that a failure does not need, one after the other."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.simulation.scenario import Scenario
from tests.simulation.world import Broken, World


def outcome_of(world: World) -> str:
    """Run a world to its end; what is broken, empty if nothing is."""
    try:
        world.run()
    except Broken as err:
        return str(err)
    except Exception as err:  # an error of the simulation, or of product code outside a thread
        return "".join(traceback.format_exception(err))
    return ""


def shrink(
    scenario: Scenario, found: str, run: Callable[[Scenario], str] | None = None
) -> tuple[Scenario, str]:
    """A smaller scenario that fails, and how it fails; ``found`` is how ``scenario`` fails."""
    fails = run or (lambda smaller: outcome_of(World(smaller)))
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for smaller in _smaller(scenario):
            if now := fails(smaller):
                scenario, found, is_smaller = smaller, now, True
                break
    return scenario, found


def describe(scenario: Scenario) -> str:
    """What is left of a scenario, for people."""
    faults = "\n".join(f"  {fault}" for fault in scenario.faults)
    asks = ", ".join(f"{ask.name} at {ask.at_s:.2f} s" for ask in scenario.asks)
    return f"{faults}\n  requests: {asks}"


def _smaller(scenario: Scenario) -> Iterator[Scenario]:
    """Without one fault; without a half of the requests; without one of the last few. Requests
    that are asked on for a number of steps go first."""
    if scenario.num_steps:
        yield replace(scenario, num_steps=0)
    for i in range(len(scenario.faults)):
        faults = scenario.faults[:i] + scenario.faults[i + 1 :]
        yield replace(scenario, faults=faults)
    asks = scenario.asks
    if len(asks) > 3:
        half = len(asks) // 2
        yield replace(scenario, asks=asks[:half])
        yield replace(scenario, asks=asks[half:])
    else:
        for i in range(len(asks)):
            yield replace(scenario, asks=asks[:i] + asks[i + 1 :])
