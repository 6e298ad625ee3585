"""The order of eviction on traces: close to the ideal one, which knows the future."""

from __future__ import annotations

import statistics
from collections import Counter

import pytest

from benchmarks.simulated.agent_trace import (
    ASKED_TURNS,
    TOKENS_PER_S,
    AgentRequest,
    agent_sessions,
    one_shots,
)
from benchmarks.simulated.request_trace import BLOCK_TOKENS, conversations
from benchmarks.simulated.retention import (
    SIZES,
    TIERS,
    TierCache,
    Use,
    found_blocks,
    ideal_blocks,
    lru_blocks,
    no_hints,
    section,
    some_ends,
    tier_blocks,
    uses_of,
    working_set,
)

pytestmark = pytest.mark.heavy

ONE_IN = 8
"""Blocks of which one is replayed: to save time."""


@pytest.fixture(scope="module")
def agents() -> list[AgentRequest]:
    return agent_sessions(1, 60)


@pytest.fixture(scope="module")
def uses(agents: list[AgentRequest]) -> list[Use]:
    return uses_of(agents, ONE_IN)


def test_the_sessions_are_as_published() -> None:
    requests = agent_sessions(1, 90)
    turns = Counter(r.session for r in requests if "." not in r.session)
    helped = {r.session.partition(".")[0] for r in requests if "." in r.session}
    seen, num_seen = set[int](), 0
    for request in requests:
        num_seen += next(
            (i for i, b in enumerate(request.blocks) if b not in seen), len(request.blocks)
        )
        seen.update(request.blocks)
    gaps, ends = [], dict[str, float]()
    for request in requests:
        if request.session in ends:
            gaps.append(request.time_s - ends[request.session])
        ends[request.session] = request.time_s + request.output_tokens / TOKENS_PER_S
    quarters = statistics.quantiles(gaps, n=20)
    assert statistics.median(turns.values()) == pytest.approx(43, rel=0.2)
    assert statistics.median(r.prompt_tokens for r in requests) == pytest.approx(142_000, rel=0.05)
    assert statistics.median(r.output_tokens for r in requests) == pytest.approx(444, rel=0.05)
    assert num_seen * BLOCK_TOKENS > 0.96 * sum(r.prompt_tokens for r in requests)
    assert len(helped) / len(turns) == pytest.approx(0.44, abs=0.15)
    assert quarters[9] == pytest.approx(1.6, rel=0.25)
    assert quarters[14] == pytest.approx(8.6, rel=0.4)
    assert quarters[17] == pytest.approx(44, rel=0.3)
    assert 0.1 < ASKED_TURNS < 0.11


def test_each_turn_builds_on_the_one_before(agents: list[AgentRequest]) -> None:
    assert agents == agent_sessions(1, 60)
    assert agents == sorted(agents, key=lambda request: request.time_s)
    last = dict[str, AgentRequest]()
    num_compacted = 0
    for request in agents:
        before = last.get(request.session)
        if before is not None:
            assert not before.is_last
            if request.blocks[: len(before.blocks)] != before.blocks:
                num_compacted += 1
                assert request.prompt_tokens < before.prompt_tokens
        last[request.session] = request
    assert all(request.is_last for request in last.values())
    assert 0 < num_compacted < len(agents) / 40


def test_agents_find_nine_tenths_of_what_the_ideal_cache_finds(uses: list[Use]) -> None:
    size = working_set(uses)
    for part, least in zip(SIZES, (0.95, 0.99, 0.99), strict=True):
        num_blocks = int(size * part)
        found, ideal = found_blocks(uses, num_blocks), ideal_blocks(uses, num_blocks)
        assert least * ideal < found <= ideal


@pytest.mark.slow
def test_documents_do_not_push_sessions_out(agents: list[AgentRequest]) -> None:
    documents = one_shots(1, agents[-1].time_s, 0.1)
    requests = sorted([*agents, *documents], key=lambda request: request.time_s)
    uses = uses_of(requests, ONE_IN)
    num_blocks = working_set(uses) // 40
    lru, found, hinted, ideal = (
        lru_blocks(uses, num_blocks),
        found_blocks(uses, num_blocks),
        found_blocks(uses, num_blocks, some_ends(1.0)),
        ideal_blocks(uses, num_blocks),
    )
    assert lru + 0.005 * ideal < found < hinted < ideal


def test_the_ideal_is_never_beaten_and_gives_up_what_comes_last() -> None:
    def use(*names: int) -> Use:
        blocks = [number.to_bytes(32, "big") for number in names]
        return Use(time_s=0.0, names=blocks, session="", is_last=False)

    trace = [use(1, 2), use(3), use(4), use(1, 2), use(3), use(5), use(1)]
    assert ideal_blocks(trace, 2) == 3, "1 and 2 are kept, then 1"
    assert ideal_blocks(trace, 3) == 4
    assert lru_blocks(trace, 2) == 0


def test_the_order_of_a_tier_is_as_good_as_that_of_the_pool(uses: list[Use]) -> None:
    num_blocks = int(working_set(uses) * TIERS["host"])
    tier = TierCache(num_blocks)
    found = sum(tier.serve(use, no_hints(use)) for use in uses)
    assert found > 0.995 * found_blocks(uses, num_blocks)


@pytest.mark.slow
def test_lower_tiers_find_what_higher_ones_gave_up(uses: list[Use]) -> None:
    size = working_set(uses)
    by_tier = tier_blocks(uses, size, some_ends(0.5))
    alone = found_blocks(uses, int(size * TIERS["disk"]), some_ends(0.5))
    assert by_tier["pool"] > by_tier["host"] > by_tier["disk"] >= 0
    assert sum(by_tier.values()) >= 0.99 * alone


def test_the_report_compares_all_orders() -> None:
    text = section(quick=True)
    assert text.startswith("## Retention, simulated")
    for name in (
        "least recently used",
        "no hints",
        "sessions",
        "half of the last turns",
        "all last turns",
    ):
        assert text.count(f"{name} |") == 3


@pytest.mark.slow
def test_conversations_are_kept_as_promised() -> None:
    uses = uses_of(conversations())
    size = working_set(uses)
    for part, least, hinted in ((0.1, 0.77, 0.84), (0.25, 0.96, 0.96), (0.5, 0.98, 0.98)):
        num_blocks = int(size * part)
        ideal = ideal_blocks(uses, num_blocks)
        assert found_blocks(uses, num_blocks) > least * ideal
        assert found_blocks(uses, num_blocks, some_ends(0.5)) > hinted * ideal
    assert sum(tier_blocks(uses, size, some_ends(0.0)).values()) > 0.98 * ideal
