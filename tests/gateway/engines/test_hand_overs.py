"""Requests run on a worker of the prefill group, and move to one of the decode group."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import pytest

from tests.gateway.engines.test_resubmission import ALPHABET, Workers, start, workers
from tests.gateway.fakes import ScriptedEngine
from tests.gateway.stack import WAIT_S, complete
from workers.requests.block_hash import SHORT_BYTES, block_hashes
from workers.requests.request import Request, SoloStage
from workers.requests.wire import Prefetched

__all__ = ["workers"]
TEXT = "0abcdefghijklmnopqrs"
SIZE = 16
LONG = "the world is a hello; other words follow, and more " * 4


def with_groups(
    workers: Workers, num_free: int, groups: str = "prefill decode decode", **settings: Any
) -> list[ScriptedEngine]:
    """Add a worker of each of these groups, with ``num_free`` free KV blocks."""
    engines = []
    for group in groups.split():
        workers.groups[f"attention-{len(workers.groups)}"] = group
        engine = workers.add(script=ALPHABET, step_s=0.01, kv_block_size=SIZE, **settings)
        engines.append(engine)
        report(workers, engine, num_free=num_free)
    return engines


def report(
    workers: Workers, engine: ScriptedEngine, request: Request | None = None, num_free: int = 0
) -> None:
    """Report the blocks of a request's prompt, and how many are free."""
    hashes = [] if request is None else block_hashes(request, SIZE, None)
    (client,) = (c for c in workers.stack.engines.clients if c.worker == engine.name)
    workers.stack.run(engine.report_blocks([name[:SHORT_BYTES] for name in hashes], num_free))
    is_known = lambda: client.load.free_tokens == num_free * SIZE  # noqa: E731
    workers.stack.wait_for(is_known, "the report")


def ask(workers: Workers, prompt: str = LONG, **fields: Any) -> Future[Any]:
    fields = {"prompt": prompt, "max_tokens": len(TEXT), **fields}
    return start(lambda: complete(workers.stack, **fields))


def text(answer: Future[Any]) -> str:
    found: str = answer.result(WAIT_S)["choices"][0]["text"]
    return found


def test_each_moves_after_its_first_token_to_the_worker_with_less_to_do(workers: Workers) -> None:
    source, *targets = with_groups(workers, 1000)
    source.is_paused = True
    answers = [ask(workers) for _ in range(2)]
    workers.stack.wait_for(lambda: len(source.requests) == 2, "the requests")
    source.is_paused = False
    assert {text(answer) for answer in answers} == {TEXT}
    assert [request.pauses for request in source.requests] == [True, True]
    assert source.pauses == []
    for engine in targets:
        (request,) = engine.requests
        assert (request.attempt, request.kv_peer) == (1, "attention-0")
        assert [len(ids) for ids in request.output_so_far] == [1]
        assert not request.pauses


@pytest.mark.parametrize("fields", [{"max_tokens": 1}, {"n": 2, "use_beam_search": True}])
def test_requests_without_further_tokens_and_beams_stay(
    workers: Workers, fields: dict[str, Any]
) -> None:
    source, target = with_groups(workers, 1000, "prefill decode")
    ask(workers, **fields).result(WAIT_S)
    assert [request.pauses for request in source.requests] == [False]
    assert target.requests == []


def test_blocks_are_fetched_while_the_prompt_is_computed(workers: Workers) -> None:
    """One fetch at a time, of the first two prompts, each after a message about blocks."""
    source, target = with_groups(workers, 1000, "prefill decode", is_paused=True)
    target.is_paused = target.answers_prefetches = False
    answers = [ask(workers) for _ in range(3)]
    workers.stack.wait_for(lambda: len(source.requests) == 3, "the requests")
    workers.stack.run(source.report_blocks([]))
    workers.stack.wait_for(lambda: len(target.prefetches) == 2, "the first fetches")
    names = [request.request_id for request in source.requests]
    assert [request.request_id for request in target.prefetches] == names[:2]
    assert {request.kv_peer for request in target.prefetches} == {"attention-0"}
    source.is_paused = False
    assert [text(answer) for answer in answers] == [TEXT] * 3
    assert sorted(request.request_id for request in target.requests) == sorted(names)


def test_without_room_it_decodes_until_there_is_some(workers: Workers) -> None:
    source, target = with_groups(workers, 0, "prefill decode")
    source.step_s = 0.05
    answer = ask(workers)
    workers.stack.wait_for(lambda: bool(source.pauses), "that it stays")
    (stayed,) = source.pauses
    assert (stayed.is_cancelled, target.requests) == (True, [])
    report(workers, target, num_free=1000)
    assert text(answer) == TEXT
    assert [(p.is_cancelled, p.num_tokens) for p in source.pauses] == [(True, 0), (False, 0)]
    assert [request.kv_peer for request in target.requests] == ["attention-0"]


def test_a_lost_decode_worker_is_replaced(workers: Workers) -> None:
    source, first, second = with_groups(workers, 1000, is_paused=True)
    source.is_paused = False
    answer = ask(workers)
    workers.stack.wait_for(lambda: bool(first.requests or second.requests), "the move")
    lost, other = (first, second) if first.requests else (second, first)
    other.is_paused = False
    workers.stop(lost)
    workers.publish("SERVING")
    assert text(answer) == TEXT
    (request,) = other.requests
    assert (request.attempt, request.kv_peer) == (3, "attention-0")


def test_the_decode_group_computes_prompts_alone_without_a_prefill_worker(
    workers: Workers,
) -> None:
    (decoder,) = with_groups(workers, 1000, "decode")
    assert text(ask(workers)) == TEXT
    assert [request.pauses for request in decoder.requests] == [False]


def test_a_decode_worker_that_has_almost_the_whole_prompt_computes_the_rest(
    workers: Workers,
) -> None:
    source, target = with_groups(workers, 1000, "prefill decode")
    assert text(ask(workers)) == TEXT
    (known,) = source.requests
    report(workers, target, known, 1001)  # another number, to wait for it
    assert text(ask(workers, LONG + "the")) == TEXT
    assert len(source.requests) == 1
    assert not target.requests[-1].pauses
    assert text(ask(workers, LONG + LONG)) == TEXT
    assert len(source.requests) == 2


def test_workers_change_their_groups_while_they_serve(workers: Workers) -> None:
    """What decodes in the prefill group leaves it; a prompt in the decode group stays there."""
    first, second = with_groups(workers, 1000, "decode prefill", is_paused=True)
    answers = [ask(workers)]
    workers.stack.wait_for(lambda: len(second.requests) == 1, "the prompt")
    workers.groups = {"attention-0": "prefill", "attention-1": "decode"}
    workers.publish("SERVING")
    second.is_paused = False
    workers.stack.wait_for(lambda: bool(second.pauses), "that it stays")
    assert (second.pauses[0].is_cancelled, first.requests) == (True, [])
    answers.append(ask(workers))
    workers.stack.wait_for(lambda: len(first.requests) == 1, "the other prompt")
    first.is_paused = False
    assert [text(answer) for answer in answers] == [TEXT] * 2
    assert [request.attempt for request in second.requests] == [0, 1]


def test_suspects_run_alone_in_one_group_only(workers: Workers) -> None:
    """Else an innocent one would be blamed for a death in the other group."""
    source, target = with_groups(workers, 1000, "prefill decode")
    target.is_paused = True
    answer = ask(workers)
    workers.stack.wait_for(lambda: bool(target.requests), "the move")
    workers.stack.run(target.offer_solo_step(target.requests[0]))
    workers.stack.wait_for(lambda: len(source.requests) == 2, "the move back")
    target.is_paused = False
    assert text(answer) == TEXT
    assert target.solo_steps == []
    again = source.requests[1]
    assert (again.num_deaths, again.attempt) == (2, 2)
    assert source.solo_steps[0].stage is SoloStage.OFFERED


def test_blocks_of_a_step_that_ends_during_a_fetch_are_fetched_next(workers: Workers) -> None:
    source, target = with_groups(workers, 1000, "prefill decode", is_paused=True)
    target.is_paused = target.answers_prefetches = False
    answer = ask(workers)
    workers.stack.wait_for(lambda: len(target.prefetches) == 1, "the first fetch")
    report(workers, source, num_free=999)
    asked, attempt = target.prefetches[0].request_id, target.prefetches[0].attempt
    workers.stack.run(target.send(Prefetched(request_id=asked, attempt=attempt)))
    workers.stack.wait_for(lambda: len(target.prefetches) == 2, "the next fetch")
    source.is_paused = False
    assert text(answer) == TEXT
