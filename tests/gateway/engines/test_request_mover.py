"""A worker is drained: its requests move to another one while they decode."""

from __future__ import annotations

from concurrent.futures import Future
from functools import partial
from typing import Any

import pytest

from gateway.engines import request_mover
from gateway.engines.request_mover import MAX_CONCURRENT_MOVES
from tests.gateway.engines.test_resubmission import ALPHABET, Workers, start, workers
from tests.gateway.fakes import ScriptedEngine
from tests.gateway.stack import WAIT_S, complete
from workers.requests.request import Request

__all__ = ["workers"]
TEXT = "0abcdefghijklmnopqrs"


def running(
    workers: Workers, num_requests: int = 1, pause_after: int | None = 5, **fields: Any
) -> tuple[ScriptedEngine, list[Future[Any]]]:
    """A worker that stands in the middle of requests; it goes on without ``pause_after``."""
    source = workers.add(script=ALPHABET, pause_after=pause_after, step_s=0.005)
    fields = {"prompt": "hello", "max_tokens": len(TEXT), **fields}
    answers = [start(lambda: complete(workers.stack, **fields)) for _ in range(num_requests)]
    num_stuck = num_requests if pause_after is not None else 0
    workers.stack.wait_for(
        lambda: len(source.stuck) == num_stuck and len(source.requests) == num_requests, "requests"
    )
    return source, answers


def drain(workers: Workers, **states: str) -> None:
    workers.publish("SERVING", **(states or {"attention_0": "DRAINING"}))


def metric(workers: Workers, name: str, cause: str) -> float:
    label = f'expertmesh:{name}{{cause="{cause}",model_name="tiny"}} '
    lines = workers.stack.gateway.metrics.render().decode().splitlines()
    (value,) = (line.removeprefix(label) for line in lines if line.startswith(label))
    return float(value)


def test_a_request_goes_over_once_its_blocks_are_there(workers: Workers) -> None:
    source, (answer,) = running(workers)
    target = workers.add(script=ALPHABET)
    drain(workers)
    assert answer.result(WAIT_S)["choices"][0]["text"] == TEXT
    (prefetch,), (request,) = target.prefetches, target.requests
    assert (prefetch.attempt, prefetch.kv_peer) == (0, "attention-0")
    assert [len(ids) for ids in prefetch.output_so_far] == [5]
    assert (request.attempt, request.kv_peer, request.num_deaths) == (1, "", 0)
    assert request.output_so_far == prefetch.output_so_far
    assert [(p.request_id, p.is_cancelled) for p in source.pauses] == [(request.request_id, False)]
    assert [name for name, _ in source.aborts] == [request.request_id]
    assert metric(workers, "requests_replayed_total", "moved") == 1.0
    assert metric(workers, "tokens_recomputed_total", "moved") == 0.0


def test_it_decodes_on_until_its_blocks_are_there(workers: Workers) -> None:
    source, (answer,) = running(workers, pause_after=None)
    workers.add(script=ALPHABET, answers_prefetches=False)
    drain(workers)
    assert answer.result(WAIT_S)["choices"][0]["text"] == TEXT
    assert source.aborts == []
    assert workers.engines["attention-1"].requests == []
    assert len(workers.engines["attention-1"].prefetches) == 1


def test_choices_that_have_ended_do_not_move(workers: Workers) -> None:
    def script(request: Request, choice: int) -> list[int]:
        return ALPHABET(request, choice)[: 3 if choice else None]

    source = workers.add(script=script, pause_after=5)
    answer = start(lambda: complete(workers.stack, prompt="hello", max_tokens=20, n=2))
    workers.stack.wait_for(lambda: len(source.stuck) == 1, "the middle")
    target = workers.add(script=ALPHABET)
    drain(workers)
    answer.result(WAIT_S)
    assert [request.closed_choices for request in target.prefetches] == [(1,)]


def test_a_request_without_output_is_handed_over_at_once(workers: Workers) -> None:
    _, (answer,) = running(workers, pause_after=0)
    target = workers.add(script=ALPHABET)
    drain(workers)
    assert answer.result(WAIT_S)["choices"][0]["text"] == TEXT
    assert target.prefetches == []
    assert metric(workers, "requests_replayed_total", "handed_back") == 1.0


def test_few_requests_of_a_worker_move_at_a_time(workers: Workers) -> None:
    source, answers = running(workers, MAX_CONCURRENT_MOVES + 3)
    target = workers.add(script=ALPHABET, answers_prefetches=False)
    drain(workers)
    workers.stack.wait_for(
        lambda: len(target.prefetches) == MAX_CONCURRENT_MOVES, "the first moves"
    )
    other = workers.add(script=ALPHABET)
    drain(workers, attention_0="DRAINING", attention_1="LOST")
    for answer in answers:
        assert answer.result(WAIT_S)["choices"][0]["text"] == TEXT
    assert len(other.prefetches) == MAX_CONCURRENT_MOVES + 3
    assert len(source.aborts) == MAX_CONCURRENT_MOVES + 3


def test_a_request_that_misses_its_blocks_moves_all_the_same(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_mover, "_ANSWER_LIMIT_S", 0.05)
    _, (answer,) = running(workers)
    target = workers.add(script=ALPHABET, answers_prefetches=False)
    drain(workers)
    assert answer.result(WAIT_S)["choices"][0]["text"] == TEXT
    assert len(target.requests) == 1
    assert metric(workers, "requests_replayed_total", "handed_back") == 1.0


def test_blocks_of_many_new_tokens_are_fetched_again(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_mover, "MAX_REMAINING_TOKENS", -1)
    _, (answer,) = running(workers)
    target = workers.add(script=ALPHABET)
    drain(workers)
    assert answer.result(WAIT_S)["choices"][0]["text"] == TEXT
    assert len(target.prefetches) == request_mover.MAX_ROUNDS


def test_a_lost_source_means_a_replay(workers: Workers) -> None:
    source, (answer,) = running(workers)
    target = workers.add(script=ALPHABET, answers_prefetches=False)
    drain(workers)
    workers.stack.wait_for(lambda: bool(target.prefetches), "the move")
    workers.stop(source)
    assert answer.result(WAIT_S)["choices"][0]["text"] == TEXT
    assert metric(workers, "requests_replayed_total", "moved") == 0.0


def test_a_request_stays_when_its_worker_does(workers: Workers) -> None:
    source, (answer,) = running(workers)
    target = workers.add(script=ALPHABET, answers_prefetches=False)
    drain(workers)
    workers.stack.wait_for(lambda: bool(target.prefetches), "the move")
    drain(workers, attention_0="SERVING")
    source.pause_after = None
    assert answer.result(WAIT_S)["choices"][0]["text"] == TEXT
    assert source.aborts == []
    assert target.requests == []


def test_a_worker_that_does_not_pause_is_left_all_the_same(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_mover, "_PAUSE_LIMIT_S", 0.05)
    source, (answer,) = running(workers)
    source.answers_pauses = False
    target = workers.add(script=ALPHABET)
    drain(workers)
    assert answer.result(WAIT_S)["choices"][0]["text"] == TEXT
    assert (len(source.pauses), len(target.requests)) == (1, 1)
    assert metric(workers, "requests_replayed_total", "moved") == 1.0


def test_a_choice_may_end_while_its_request_moves(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others move all the same, and only their new tokens count as computed again."""
    monkeypatch.setattr(request_mover, "_PAUSE_LIMIT_S", WAIT_S)

    def script(request: Request, choice: int) -> list[int]:
        return [5] * (8 if choice else 10)

    source = workers.add(script=script, pause_after=5, step_s=0.005)
    answer = start(lambda: complete(workers.stack, prompt="hello", max_tokens=10, n=2))
    workers.stack.wait_for(lambda: len(source.stuck) == 1, "the middle")
    source.answers_pauses = False
    target = workers.add(script=script)
    drain(workers)
    workers.stack.wait_for(lambda: bool(source.pauses), "the pause")
    (name,) = source.running
    source.stuck.clear()
    source.pause_after = 9
    workers.stack.wait_for(lambda: source.stuck == {name}, "the end of a choice")
    assert source.running[name] == {0}
    source.to_pause[name] = 0
    assert answer.result(WAIT_S)["usage"]["completion_tokens"] == 18
    assert len(target.requests) == 1
    assert metric(workers, "requests_replayed_total", "moved") == 1.0
    assert metric(workers, "tokens_recomputed_total", "moved") == 4.0


@pytest.mark.parametrize("is_lost", [False, True], ids=["the worker stays", "the other is lost"])
def test_a_paused_request_that_stays_goes_on(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, is_lost: bool
) -> None:
    monkeypatch.setattr(request_mover, "_PAUSE_LIMIT_S", WAIT_S)
    source, (answer,) = running(workers)
    source.answers_pauses = False
    target = workers.add(script=ALPHABET)
    drain(workers)
    workers.stack.wait_for(lambda: bool(source.pauses), "the pause")
    if is_lost:
        workers.stop(target)
        workers.stack.wait_for(lambda: len(workers.stack.engines.clients) == 0, "its loss")
    else:
        drain(workers, attention_0="SERVING")
    workers.stack.wait_for(lambda: len(source.pauses) == 2, "the end of the pause")
    assert [p.is_cancelled for p in source.pauses] == [False, True]
    source.pause_after = None
    assert answer.result(WAIT_S)["choices"][0]["text"] == TEXT
    assert (source.aborts, target.requests) == ([], [])


def test_new_requests_go_to_the_others(workers: Workers) -> None:
    source, (answer,) = running(workers)
    target = workers.add(script=ALPHABET, answers_prefetches=False)
    drain(workers)
    assert complete(workers.stack, prompt="hello", max_tokens=3)["choices"][0]["text"] == "0ab"
    assert (len(source.requests), len(target.requests)) == (1, 1)
    source.pause_after = None
    answer.result(WAIT_S)


def test_requests_wait_at_their_worker_while_there_is_no_other(workers: Workers) -> None:
    _, (answer,) = running(workers)
    drain(workers)
    target = workers.add(script=ALPHABET)
    drain(workers)
    assert answer.result(WAIT_S)["choices"][0]["text"] == TEXT
    assert len(target.prefetches) == 1


def test_a_request_stays_while_no_other_worker_has_its_adapter(workers: Workers) -> None:
    source, answers = running_with_adapters(workers)
    first = workers.add(script=ALPHABET)
    workers.adapters(lacking=["attention-1"])
    drain(workers)
    assert answers["chat"].result(WAIT_S)["choices"][0]["text"] == TEXT
    assert [request.adapter for request in first.requests] == ["chat@1"]
    assert not answers["sql"].done()
    second = workers.add(script=ALPHABET)
    drain(workers)
    assert answers["sql"].result(WAIT_S)["choices"][0]["text"] == TEXT
    assert [request.adapter for request in first.requests] == ["chat@1"]
    assert [request.adapter for request in second.requests] == ["sql@0"]
    assert len(source.aborts) == 2


def running_with_adapters(workers: Workers) -> tuple[ScriptedEngine, dict[str, Future[Any]]]:
    """A worker that stands in the middle of two requests; the answers by adapter."""
    workers.adapters()
    source = workers.add(script=ALPHABET, pause_after=5, step_s=0.005)
    answers: dict[str, Future[Any]] = {}
    for name in ("sql", "chat"):
        fields = {"model": name, "prompt": "hello", "max_tokens": len(TEXT)}
        answers[name] = start(partial(complete, workers.stack, **fields))
        workers.stack.wait_for(lambda: len(source.stuck) == len(answers), "a request")
    return source, answers


def press(workers: Workers, free_tokens: int) -> None:
    """The first worker asks to have its requests moved; the second one has so much room."""
    pool = workers.stack.engines

    def call() -> None:
        source, target = pool.clients
        target.load.free_tokens = free_tokens
        for entry in source.submissions:
            pool.moves.on_kv_pressure(entry, source)

    workers.stack.call(call)


def test_a_worker_without_blocks_is_relieved_where_there_is_room(workers: Workers) -> None:
    source, answers = running(workers, 3)
    target = workers.add(script=ALPHABET)
    press(workers, 1000)
    workers.stack.wait_for(lambda: len(target.requests) == 1, "one request")
    source.pause_after = None
    for answer in answers:
        assert answer.result(WAIT_S)["choices"][0]["text"] == TEXT
    assert (len(target.prefetches), len(source.aborts)) == (1, 1), "one at a time"
    assert metric(workers, "requests_replayed_total", "moved") == 1.0


def test_a_worker_without_blocks_helps_itself_where_there_is_no_room(workers: Workers) -> None:
    source, (answer,) = running(workers)
    target = workers.add(script=ALPHABET)
    press(workers, 8)
    source.pause_after = None
    assert answer.result(WAIT_S)["choices"][0]["text"] == TEXT
    assert (target.prefetches, target.requests, source.aborts) == ([], [], [])


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_request_that_may_stay_does_if_its_blocks_do_not_come(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, is_lost: bool
) -> None:
    monkeypatch.setattr(request_mover, "_ANSWER_LIMIT_S", 0.05)
    source, (answer,) = running(workers)
    target = workers.add(script=ALPHABET, answers_prefetches=False)
    press(workers, 1000)
    workers.stack.wait_for(lambda: bool(target.prefetches), "the move")
    if is_lost:
        workers.stop(target)
    source.pause_after = None
    assert answer.result(WAIT_S)["choices"][0]["text"] == TEXT
    assert (target.requests, source.aborts) == ([], [])


@pytest.mark.parametrize("is_busy", [False, True], ids=["idle", "busy"])
def test_a_move_waits_for_a_full_block(workers: Workers, is_busy: bool) -> None:
    """The pause begins with that block between idle workers, else once it has come."""
    source = workers.add(pause_after=5, step_s=0.005)
    fields = {"prompt": "hello", "max_tokens": 60, "seed": 1}
    answer = start(lambda: complete(workers.stack, **fields))
    workers.stack.wait_for(lambda: len(source.stuck) == 1, "the middle")
    target = workers.add(kv_block_size=16, step_s=0.005)
    if is_busy:
        start(lambda: complete(workers.stack, **{**fields, "max_tokens": 400}))
        workers.stack.wait_for(lambda: len(target.requests) == 1, "another one")
        target.requests.clear()
    drain(workers)
    workers.stack.wait_for(lambda: len(target.prefetches) == 1, "the first prefetch")
    source.pause_after = None
    assert answer.result(WAIT_S)["usage"]["completion_tokens"] == 60
    _, last, moved = [
        len(request.prompt) + len(request.output_so_far[0])
        for request in (*target.prefetches, *target.requests)
    ]
    assert last % 16 == 0, "a token has just completed a block"
    assert [p.num_tokens for p in source.pauses] == [0 if is_busy else last + 1]
    assert moved >= last if is_busy else moved == last + 1


def test_the_shortest_choice_completes_the_block(workers: Workers) -> None:
    def script(request: Request, choice: int) -> list[int]:
        return [5 + choice] * 60

    source = workers.add(script=script, pause_after=5, step_s=0.005)
    fields = {"prompt": "hello", "max_tokens": 60, "n": 2}
    answer = start(lambda: complete(workers.stack, **fields))
    workers.stack.wait_for(lambda: len(source.stuck) == 1, "the middle")
    target = workers.add(script=script, kv_block_size=16)
    drain(workers)
    workers.stack.wait_for(lambda: len(target.prefetches) == 1, "the first prefetch")
    source.pause_after = None
    assert answer.result(WAIT_S)["usage"]["completion_tokens"] == 120
    (moved,) = target.requests
    shortest = min(map(len, moved.output_so_far))
    assert (len(moved.prompt) + shortest) % 16 == 1
