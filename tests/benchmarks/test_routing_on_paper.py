"""The gateway's policies on traces, in simulated time: as good as promised, on any trace."""

from __future__ import annotations

import random

import pytest

from benchmarks.simulated.request_trace import (
    BLOCK_TOKENS,
    TracedRequest,
    conversations,
    multi_turn,
)
from benchmarks.simulated.routing import (
    ALONE,
    CASES,
    FETCHING,
    TOGETHER,
    Outcome,
    Rules,
    replay,
    section,
)
from gateway.engines.router import RoutingPolicy

NEVER_WORSE = {ALONE: 1.1, FETCHING: 1.01, TOGETHER: 1.01}
"""Most that the mean may be of that by load: without fetches, bursts that all want one prefix may
wait for it a little too long."""


def kv(requests: list[TracedRequest], rules: Rules = TOGETHER, speed: float = 1.0) -> Outcome:
    """Route by prefix; every request is served."""
    outcome = replay(requests, RoutingPolicy.KV, speed, rules)
    assert len(outcome.ttft_s) == len(requests)
    return outcome


def least_wait(requests: list[TracedRequest]) -> Outcome:
    """Route by load."""
    return replay(requests, RoutingPolicy.LEAST_LOADED)


def bursts(seed: int) -> list[TracedRequest]:
    """Requests of any size at any time, that begin in some of a few ways, or are all their own."""
    draw = random.Random(seed)
    chains = [[1000 * c + k for k in range(draw.randint(1, 60))] for c in range(draw.randint(1, 8))]
    shared = draw.random()
    time_s, found = 0.0, []
    for number in range(draw.randint(50, 300)):
        if draw.random() < draw.choice((0.2, 1.0)):
            time_s += draw.expovariate(1 / draw.choice((0.05, 0.5, 2.0)))
        chain = draw.choice(chains) if draw.random() < shared else []
        blocks = chain[: draw.randint(0, len(chain))]
        blocks += [10**6 + 1000 * number + k for k in range(draw.randint(1, 40))]
        tokens = len(blocks) * BLOCK_TOKENS - draw.randrange(BLOCK_TOKENS)
        found.append(TracedRequest(time_s, tokens, blocks))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rules", [ALONE, FETCHING, TOGETHER], ids=["alone", "fetching", "all"])
def test_no_trace_does_better_by_load_alone(rules: Rules) -> None:
    for seed in range(12):
        draw = random.Random(seed)
        rate, turns = draw.uniform(1, 8), draw.uniform(1, 8)
        chats = multi_turn(seed, 250, mean_turns=turns, rate_per_s=rate)
        for requests in (chats, bursts(seed)):
            most = NEVER_WORSE[rules] * least_wait(requests).mean_s
            assert kv(requests, rules).mean_s <= most, seed


def test_chats_gain_much() -> None:
    requests = multi_turn(0, 1500)
    by_load, alone, together = least_wait(requests), kv(requests, ALONE), kv(requests)
    assert alone.mean_s < 0.6 * by_load.mean_s
    assert together.mean_s < alone.mean_s
    assert together.hit_rate > alone.hit_rate > 2 * by_load.hit_rate


def test_the_report_compares_all_cases_and_times_decisions() -> None:
    text = section(quick=True)
    assert text.startswith("## Routing, simulated")
    for name in CASES:
        assert text.count(f": {name} |") == 3
    assert "64 workers, 100,000 blocks" in text


@pytest.mark.slow
def test_the_conversation_trace_is_served_as_promised() -> None:
    requests = list(conversations())
    alone, fetching, together = (kv(requests, rules) for rules in (ALONE, FETCHING, TOGETHER))
    assert (alone.mean_s < 1.30, alone.hit_rate > 0.265) == (True, True)
    assert (fetching.mean_s < 1.22, fetching.hit_rate > 0.283) == (True, True)
    assert (together.mean_s < 1.125, together.hit_rate > 0.30) == (True, True)
    assert kv(requests, ALONE, speed=1.4).mean_s < 1.50
