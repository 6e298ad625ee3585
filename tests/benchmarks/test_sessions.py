"""Sessions on several workers, simulated: lower tiers keep what the pool gives up."""

from __future__ import annotations

import statistics

import pytest

from benchmarks.simulated.agent_trace import AgentRequest, agent_sessions
from benchmarks.simulated.request_trace import TracedRequest, conversations
from benchmarks.simulated.retention import ideal_blocks, uses_of, working_set
from benchmarks.simulated.sessions import DISK, SYSTEMS, Outcome, replay, section


def of_ideal(requests: list[AgentRequest] | list[TracedRequest], outcome: Outcome) -> float:
    """What was found, as a part of what one cache of all workers finds that knows the future."""
    uses = uses_of(requests)
    return outcome.num_cached / ideal_blocks(uses, int(working_set(uses) * DISK.part))


@pytest.mark.slow
def test_agents_find_nine_tenths_of_the_ideal_with_all_tiers() -> None:
    requests = agent_sessions(1, 8)
    found = {name: replay(requests, system) for name, system in SYSTEMS.items()}
    best, pool = found["`kv`, all tiers"], found["`kv`, pool"]
    assert of_ideal(requests, best) > 0.95
    assert of_ideal(requests, best) > of_ideal(requests, pool) + 0.1
    means = {name: statistics.fmean(outcome.ttft_s) for name, outcome in found.items()}
    assert min(means, key=means.__getitem__) == "`kv`, all tiers"
    assert max(means, key=means.__getitem__) == "round-robin, pool"


@pytest.mark.slow
def test_the_report_compares_all_systems() -> None:
    text = section(quick=True)
    assert text.startswith("## Sessions, simulated")
    for name in SYSTEMS:
        assert text.count(f": {name} |") == 2


@pytest.mark.slow
def test_conversations_find_nine_tenths_of_the_ideal() -> None:
    requests = conversations()
    assert of_ideal(requests, replay(requests, SYSTEMS["`kv`, all tiers"])) > 0.9
