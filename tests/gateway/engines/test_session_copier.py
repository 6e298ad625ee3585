"""A second worker keeps copies of a session's blocks: which one, of what, and when it is told."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from cluster.config.cluster import EngineSection
from cluster.config.gateway import GatewaySection
from gateway.engines import session_copier
from gateway.engines.session_copier import CopyTarget, pick_copy_target
from tests.gateway.engines.test_resubmission import ALPHABET, Workers, start, workers
from tests.gateway.fakes import ScriptedEngine
from tests.gateway.stack import WAIT_S, complete, running_stack
from workers.requests.block_hash import SHORT_BYTES, block_hashes
from workers.requests.request import Request, SamplingParams
from workers.requests.wire import KeepCopy

__all__ = ["workers"]
BLOCK = 4
PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13]
"""Two full blocks and a token."""


@pytest.fixture(autouse=True)
def many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short prompts are copied before their requests end."""
    monkeypatch.setattr(session_copier, "MIN_EARLY_COPY_BLOCKS", 1)


def keepers(*names: str, num_known: int = 0) -> list[CopyTarget]:
    return [CopyTarget(name=name, is_on_other_host=False, num_known=num_known) for name in names]


def test_the_only_other_worker_keeps_the_copies_and_without_one_nobody_does() -> None:
    (only,) = keepers("b")
    assert pick_copy_target([only], 8, "s") is only
    assert pick_copy_target([], 8, "s") is None


def test_sessions_spread_over_the_workers() -> None:
    found = Counter(
        keeper.name
        for number in range(300)
        if (keeper := pick_copy_target(keepers("a", "b", "c"), 8, f"session-{number}")) is not None
    )
    assert found.keys() == {"a", "b", "c"}
    assert min(found.values()) > 60


def test_a_lost_worker_moves_its_own_sessions_only() -> None:
    for number in range(100):
        before = pick_copy_target(keepers("a", "b", "c"), 8, f"session-{number}")
        after = pick_copy_target(keepers("a", "c"), 8, f"session-{number}")
        assert before is not None
        assert after is not None
        assert before.name in ("b", after.name)


def test_the_order_of_the_workers_does_not_matter() -> None:
    for number in range(20):
        names = [
            pick_copy_target(keepers(*order), 8, f"session-{number}")
            for order in ("abc", "cab", "bca")
        ]
        assert len({keeper.name for keeper in names if keeper is not None}) == 1


@pytest.mark.parametrize(("num_known", "stays"), [(3, False), (4, True), (8, True)])
def test_a_worker_with_half_of_the_blocks_keeps_the_rest(num_known: int, stays: bool) -> None:
    others = keepers("a", "b", "c")
    first = pick_copy_target(others, 8, "s")
    assert first is not None
    (known, *_) = (keeper for keeper in others if keeper is not first)
    has_some = CopyTarget(name=known.name, is_on_other_host=False, num_known=num_known)
    found = pick_copy_target([has_some, *(k for k in others if k is not known)], 8, "s")
    assert found is not None
    assert (found.name == known.name) is stays


def test_another_host_comes_first() -> None:
    there = CopyTarget(name="d", is_on_other_host=True, num_known=0)
    for number in range(20):
        others = [*keepers("a", "b", num_known=8), there]
        assert pick_copy_target(others, 8, f"session-{number}") is there


def add(workers: Workers, **settings: Any) -> ScriptedEngine:
    fields = {"script": ALPHABET, "kv_block_size": BLOCK, "keeps_copies": True, **settings}
    return workers.add(**fields)


def turn(workers: Workers, **fields: Any) -> dict[str, Any]:
    """A turn of ten tokens: 19 with the prompt, of which 18 have keys and values."""
    asked = {"prompt": PROMPT, "max_tokens": 10, "session_id": "s", **fields}
    return complete(workers.stack, **asked)


def asked_of(workers: Workers, count: int) -> list[KeepCopy]:
    """The messages to all workers, once there are so many."""
    engines = workers.engines.values()
    workers.stack.wait_for(lambda: sum(len(e.copies) for e in engines) >= count, "the messages")
    return [message for engine in engines for message in engine.copies]


def names_of(tokens: list[int], **fields: Any) -> list[bytes]:
    request = Request(request_id="r", prompt=tuple(tokens), params=SamplingParams(), **fields)
    return block_hashes(request, BLOCK, None)


def test_a_turn_is_copied_when_its_prompt_is_computed_and_at_its_end(workers: Workers) -> None:
    add(workers), add(workers)
    turn(workers, cache_ttl=60, priority=3)
    prompt, whole = asked_of(workers, 2)
    source = next(e for e in workers.engines.values() if e.requests)
    (request,) = source.requests
    assert source.copies == []
    assert {message.source for message in (prompt, whole)} == {source.name}
    assert prompt.hashes == tuple(names_of(PROMPT))
    said = [*PROMPT, *ALPHABET(request, 0)[:10]]
    assert whole.hashes == tuple(names_of(said))
    assert (len(whole.hashes), prompt.num_prompt, whole.num_prompt) == (4, 2, 2)
    assert (whole.session, whole.cache_ttl_s, whole.priority) == ("s", 60, 3)
    assert (whole.tenant, whole.may_outlive) == (request.tenant, True)


@pytest.mark.parametrize(("many_blocks", "num_messages"), [(2, 2), (3, 1)])
def test_few_blocks_of_a_prompt_come_with_its_end(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, many_blocks: int, num_messages: int
) -> None:
    monkeypatch.setattr(session_copier, "MIN_EARLY_COPY_BLOCKS", many_blocks)
    add(workers), add(workers)
    turn(workers)
    sizes = [len(message.hashes) for message in asked_of(workers, num_messages)]
    assert sizes == [2, 4][-num_messages:]


def test_the_block_of_the_newest_token_is_not_there_yet(workers: Workers) -> None:
    add(workers), add(workers)
    turn(workers, max_tokens=3)
    assert [len(message.hashes) for message in asked_of(workers, 2)] == [2, 2]


def test_a_short_prompt_is_copied_with_its_output(workers: Workers) -> None:
    add(workers), add(workers)
    turn(workers, prompt=[5, 6], max_tokens=7)
    (message,) = asked_of(workers, 1)
    assert (len(message.hashes), message.num_prompt) == (2, 0)


def test_each_choice_is_copied(workers: Workers) -> None:
    add(workers, script=lambda request, choice: [60 + choice] * 10)
    add(workers, script=lambda request, choice: [60 + choice] * 10)
    turn(workers, n=2)
    prompt, *choices = asked_of(workers, 3)
    assert prompt.hashes == tuple(names_of(PROMPT))
    assert {m.hashes for m in choices} == {
        tuple(names_of([*PROMPT, *([60 + choice] * 9)])) for choice in range(2)
    }


def test_a_turn_that_the_client_ends_is_copied_as_far_as_it_came(workers: Workers) -> None:
    add(workers, step_s=0.002), add(workers, step_s=0.002)
    turn(workers, max_tokens=20, stop=["cdef"])
    *_, whole = asked_of(workers, 2)
    assert 2 < len(whole.hashes) < 7


@pytest.mark.parametrize(
    "hints",
    [{"session_id": None}, {"cache_ttl": 0}, {"session_id": None, "cache_ttl": 0}],
    ids=["no session", "unwanted", "unwanted without a session"],
)
def test_blocks_that_nobody_wants_later_are_not_copied(
    workers: Workers, hints: dict[str, Any]
) -> None:
    add(workers), add(workers)
    turn(workers, **hints)
    turn(workers, prompt=PROMPT[1:])
    copied = {message.hashes[0] for message in asked_of(workers, 2)}
    assert copied == {names_of(PROMPT[1:])[0]}


@pytest.mark.parametrize("hints", [{"cache_ttl": 9}, {"prompt_cache_key": "k"}])
def test_a_session_needs_no_name_of_its_own(workers: Workers, hints: dict[str, Any]) -> None:
    add(workers), add(workers)
    turn(workers, session_id=None, **hints)
    assert len(asked_of(workers, 2)) == 2


def test_the_hashes_of_an_adapter_mean_nothing_later(workers: Workers) -> None:
    workers.adapters()
    add(workers), add(workers)
    turn(workers, model="sql")
    assert [message.may_outlive for message in asked_of(workers, 2)] == [False, False]


def test_workers_without_host_memory_are_left_out(workers: Workers) -> None:
    add(workers), add(workers, keeps_copies=False), add(workers, keeps_copies=False)
    keeper = workers.engines["attention-0"]
    for number in range(6):
        turn(workers, prompt=[number, *PROMPT])
    served = [len(engine.requests) for engine in workers.engines.values()]
    asked_of(workers, 2 * sum(served[1:]))
    assert {message.source for message in keeper.copies} <= {"attention-1", "attention-2"}
    assert sum(len(e.copies) for e in workers.engines.values()) == len(keeper.copies)


def test_the_only_worker_is_told_nothing(workers: Workers) -> None:
    engine = add(workers)
    turn(workers)
    add(workers)
    turn(workers, prompt=PROMPT[1:])
    assert {m.hashes[0] for m in asked_of(workers, 2)} == {names_of(PROMPT[1:])[0]}
    assert len(engine.requests) >= 1


def test_another_host_keeps_the_copies(workers: Workers) -> None:
    for node in ("host-a", "host-a", "host-b", "host-a"):
        add(workers, node=node)
    for number in range(8):
        turn(workers, prompt=[number, *PROMPT], session_id=f"s{number}")
    asked_of(workers, 16)
    for engine in workers.engines.values():
        hosts = {workers.engines[message.source].node for message in engine.copies}
        assert engine.node not in hosts or not hosts


def test_a_worker_that_leaves_keeps_no_copies_and_its_own_turns_are_copied(
    workers: Workers,
) -> None:
    source = add(workers, pause_after=3)
    answer = start(lambda: turn(workers))
    workers.stack.wait_for(lambda: len(source.stuck) == 1, "the middle")
    other = add(workers, answers_prefetches=False)
    workers.publish("SERVING", attention_0="DRAINING")
    workers.stack.wait_for(lambda: bool(other.prefetches), "the move")
    source.pause_after = None
    answer.result(WAIT_S)
    (message,) = asked_of(workers, 1)
    assert (message.source, len(source.copies)) == (source.name, 0)
    turn(workers, prompt=PROMPT[1:])
    assert len(other.requests) == 1
    assert (len(source.copies), len(other.copies)) == (0, 1)


def test_copies_stay_where_most_of_the_session_is(workers: Workers) -> None:
    engines = [add(workers) for _ in range(4)]
    turn(workers)
    asked_of(workers, 2)
    (source,) = (engine for engine in engines if engine.requests)
    (told,) = (engine for engine in engines if engine.copies)
    other = next(engine for engine in engines if engine not in (source, told))
    names = [name[:SHORT_BYTES] for name in names_of(PROMPT)]
    for engine in (source, other):
        workers.stack.run(engine.report_blocks(names))
    index = workers.stack.engines.kv
    workers.stack.wait_for(lambda: len(index.matches(names)) == 2, "the index")
    turn(workers, prompt=[*PROMPT, *PROMPT[:7]])
    asked_of(workers, 4)
    assert [len(e.requests) for e in (source, told, other)] == [2, 0, 0]
    assert [len(e.copies) for e in (source, told, other)] == [0, 2, 2]


def test_requests_that_are_lost_go_where_the_copies_are(workers: Workers) -> None:
    source = add(workers, pause_after=5)
    answer = start(lambda: turn(workers, max_tokens=20))
    workers.stack.wait_for(lambda: len(source.stuck) == 1, "the middle")
    others = [add(workers) for _ in range(3)]
    keeper = others[1]
    names = [name[:SHORT_BYTES] for name in names_of(PROMPT)]
    workers.stack.run(keeper.report_blocks(names))
    pool = workers.stack.engines
    workers.stack.wait_for(lambda: keeper.name in pool.kv.matches(names), "the index")
    workers.stop(source)
    answer.result(WAIT_S)
    (request,) = keeper.requests
    assert request.attempt == 1
    turn(workers, prompt=[*PROMPT, 20, 21, 22, 23])
    assert [len(engine.requests) for engine in others] == [0, 2, 0]


def test_other_policies_copy_nothing() -> None:
    settings = GatewaySection(request_timeout_s=WAIT_S, routing_policy="round-robin")
    with running_stack(settings, engine=EngineSection(), serving=False) as stack:
        found = Workers(stack)
        add(found), add(found)
        turn(found), turn(found)
        assert [len(engine.requests) for engine in found.engines.values()] == [1, 1]
        assert [engine.copies for engine in found.engines.values()] == [[], []]
        for engine in found.engines.values():
            stack.run(engine.stop())
