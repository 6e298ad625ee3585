"""What is left of a scenario that fails."""

from __future__ import annotations

import pytest

from tests.simulation.faults import KINDS
from tests.simulation.scenario import Scenario, draw_scenario
from tests.simulation.shrinking import describe, shrink
from tests.simulation.test_simulation import run


@pytest.mark.parametrize("seed", range(5))
def test_only_what_a_failure_needs_is_left(seed: int) -> None:
    scenario = draw_scenario(seed, KINDS)
    fault, ask = scenario.faults[seed % 3], scenario.asks[3 * seed]

    def fails(smaller: Scenario) -> str:
        return "broken" if fault in smaller.faults and ask in smaller.asks else ""

    found, how = shrink(scenario, "at first", fails)
    assert (found.faults, found.asks, found.num_steps, how) == ((fault,), (ask,), 0, "broken")
    assert describe(found) == f"  {fault}\n  requests: {ask.name} at {ask.at_s:.2f} s"


def test_a_scenario_that_cannot_be_smaller_stays() -> None:
    scenario = draw_scenario(0, KINDS)
    assert shrink(scenario, "broken", lambda smaller: "") == (scenario, "broken")


@pytest.mark.slow
@pytest.mark.distributed
def test_a_failing_seed_replays_and_shrinks() -> None:
    whole = run("--bug", "no_hold").stdout
    seed, _, _ = whole.removeprefix("seed ").partition(":")
    again = run("--bug", "no_hold", "--seed", seed, "--num", "1").stdout
    small = run("--bug", "no_hold", "--seed", seed, "--num", "1", "--shrink").stdout
    assert whole.startswith(f"seed {seed}: ")
    assert whole == again
    assert small.startswith(f"seed {seed}: ")
    assert "requests:" in small
