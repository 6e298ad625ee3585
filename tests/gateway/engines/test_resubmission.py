"""A worker is lost, its requests continue at another one: clients see a pause at most."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import grpc
import pytest

from cluster.config.cluster import EngineSection
from cluster.config.gateway import GatewaySection
from gateway.engines.submission import (
    MAX_RETURNS_WITHOUT_ADAPTER,
    MAX_TOTAL_UNACKNOWLEDGED_DEATHS,
    RequestStage,
    Submission,
)
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.fakes import (
    ScriptedEngine,
    attention_entry,
    saying,
)
from tests.gateway.grpc.test_grpc import failure, request_of
from tests.gateway.http.test_disconnect import send_raw
from tests.gateway.sse_client import by_choice, read_events
from tests.gateway.stack import WAIT_S, Stack, complete, post, running_stack
from tests.harness.tiers import quick_rows, quick_values
from workers.requests.request import Request, SoloStage
from workers.requests.wire import FromEngine

pytestmark = pytest.mark.heavy


class Workers:
    """Scripted workers behind one gateway, which come and go."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.engines: dict[str, ScriptedEngine] = {}
        self.groups: dict[str, str] = {}
        """Step groups of the workers that have one."""

    def add(self, **settings: Any) -> ScriptedEngine:
        """One more, with the next name; it serves when this returns."""
        engine = ScriptedEngine(name=f"attention-{len(self.engines)}", **settings)
        self.stack.run(engine.start())
        self.engines[engine.name] = engine
        self.publish("SERVING")
        self.stack.wait_for(
            lambda: engine.name in [c.worker for c in self.stack.engines.clients], "its stream"
        )
        return engine

    def publish(self, state: str, without: str = "", **states: str) -> None:
        """A snapshot with all workers that were not stopped; ``states`` of some of them."""
        entries = [
            attention_entry(engine, rank)
            for rank, engine in enumerate(self.engines.values())
            if engine.name != without and engine.address
        ]
        for entry in entries:
            entry["state"] = states.get(entry["name"].replace("-", "_"), entry["state"])
            entry["group"] = self.groups.get(entry["name"])
        self.stack.call(lambda: self.stack.controller.change(state=state, workers=entries))
        self._wait_for_snapshot()

    def _wait_for_snapshot(self) -> None:
        wanted = self.stack.controller.state["version"]
        view = self.stack.gateway.cluster
        self.stack.wait_for(lambda: (view.snapshot or {}).get("version") == wanted, "the snapshot")

    def adapters(self, lacking: Sequence[str] = ()) -> None:
        """Two adapters, ``sql`` and ``chat``, in a snapshot; these workers lack ``sql``."""
        entry = {"path": "/adapters", "state": "READY", "lacking": []}
        sql = {**entry, "name": "sql", "key": "sql@0", "lacking": list(lacking)}
        adapters = [sql, {**entry, "name": "chat", "key": "chat@1"}]
        self.stack.call(lambda: self.stack.controller.change(adapters=adapters))
        self._wait_for_snapshot()

    def stop(self, engine: ScriptedEngine) -> None:
        """Its process is gone; the controller has not noticed yet."""
        self.stack.run(engine.stop())
        engine.address = ""


@pytest.fixture
def workers() -> Iterator[Workers]:
    with running_stack(
        GatewaySection(request_timeout_s=WAIT_S),
        engine=EngineSection(enable_prefix_caching=True),
        serving=False,
    ) as stack:
        found = Workers(stack)
        yield found
        for engine in found.engines.values():
            stack.run(engine.stop())


def start(work: Callable[[], Any]) -> Future[Any]:
    """Run it in a thread of its own."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as err:
            future.set_exception(err)

    threading.Thread(target=run, daemon=True).start()
    return future


CASES: dict[str, dict[str, Any]] = {
    "plain": {"max_tokens": 20},
    "choices with logprobs": {"max_tokens": 20, "n": 3, "logprobs": 2, "return_token_ids": True},
    "a stop string across the loss": {"max_tokens": 20, "stop": ["abcdefgh"], "logprobs": 1},
    "minimum of tokens": {"max_tokens": 20, "stop": ["bc", "klm"], "min_tokens": 11},
    "echo with prompt logprobs": {"max_tokens": 8, "echo": True, "logprobs": 1, "n": 2},
    "two prompts": {"max_tokens": 9, "prompt": ["hello", " world"], "n": 2},
}
ALPHABET = saying("0abcdefghijklmnopqrstuvwxyz", end=False)


def _strip(answer: Any) -> Any:
    """Without what differs from call to call."""
    return {k: v for k, v in answer.items() if k not in ("id", "created")}


@pytest.mark.parametrize(("name", "pause_after"), quick_values([*CASES], [0, 1, 5]))
def test_an_answer_is_the_same_as_undisturbed(
    workers: Workers, name: str, pause_after: int
) -> None:
    fields = {"prompt": "hello", "seed": 3, **CASES[name]}
    first = workers.add(script=ALPHABET, num_cached_tokens=2)
    whole = complete(workers.stack, **fields)
    streamed = by_choice(read_events(workers.stack, "/v1/completions", **fields))
    first.pause_after = pause_after
    answers = [
        start(lambda: complete(workers.stack, **fields)),
        start(lambda: read_events(workers.stack, "/v1/completions", **fields)),
    ]
    num_prompts = 2 * (len(fields["prompt"]) if isinstance(fields["prompt"], list) else 1)
    workers.stack.wait_for(lambda: len(first.stuck) == num_prompts, "the middle of all")
    second = workers.add(script=ALPHABET, num_cached_tokens=2 if pause_after == 0 else 4)
    workers.stop(first)
    assert _strip(answers[0].result(WAIT_S)) == _strip(whole)
    assert _texts(by_choice(answers[1].result(WAIT_S))) == _texts(streamed)
    assert [request.attempt for request in second.requests] == [1] * num_prompts
    for request in second.requests:
        assert all(len(ids) <= pause_after for ids in request.output_so_far)
    metrics = workers.stack.gateway.metrics.render().decode()
    labels = '{cause="attention_worker",model_name="tiny"}'
    assert f"requests_replayed_total{labels} {num_prompts}.0" in metrics


def test_a_request_that_cannot_be_placed_fails_alone(workers: Workers) -> None:
    first = workers.add(script=ALPHABET, num_cached_tokens=2)
    first.pause_after = 1
    answers = [
        start(lambda: post(workers.stack, "/v1/completions", prompt="hello", max_tokens=9))
        for _ in range(3)
    ]
    workers.stack.wait_for(lambda: len(first.stuck) == len(answers), "the middle of all")
    unlucky = iter([True])

    def fail_once(entry: Submission) -> None:
        if next(unlucky, False):
            raise ValueError("no room for its trace")

    workers.stack.engines.on_resubmit = fail_once
    workers.add(script=ALPHABET)
    workers.stop(first)
    results = sorted((answer.result(WAIT_S) for answer in answers), key=lambda r: r.status_code)
    assert [result.status_code for result in results] == [200, 200, 500]
    assert "could not be assigned: no room for its trace" in results[-1].json()["error"]["message"]


def _texts(choices: dict[int, list[dict[str, Any]]]) -> dict[int, Any]:
    return {
        index: (
            "".join(part["text"] for part in parts),
            [t for part in parts for t in (part["logprobs"] or {}).get("token_logprobs", ())],
            parts[-1]["finish_reason"],
            parts[-1]["stop_reason"],
        )
        for index, parts in choices.items()
    }


def test_grpc_answers_are_the_same_as_undisturbed(workers: Workers) -> None:
    first = workers.add(script=ALPHABET)
    request = request_of(
        text="hello",
        sampling_params={"max_tokens": 20, "seed": "3", "n": 2},
        output_options={"logprobs": 1},
    )
    with grpc.insecure_channel(workers.stack.grpc_target) as channel:
        stub = InferenceStub(channel)
        whole = stub.Generate(request, timeout=WAIT_S)
        chunks = list(stub.GenerateStream(request, timeout=WAIT_S))
        first.pause_after = 6
        again = stub.Generate.future(request, timeout=WAIT_S)
        stream = stub.GenerateStream(request, timeout=WAIT_S)
        workers.stack.wait_for(lambda: len(first.stuck) == 2, "the middle of both")
        workers.add(script=ALPHABET)
        workers.stop(first)
        assert list(again.result(WAIT_S).choices) == list(whole.choices)
        assert again.result(WAIT_S).usage == whole.usage
        assert _joined(list(stream)) == _joined(chunks)


def _joined(chunks: list[pb.GenerateChunk]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for chunk in chunks:
        text, ids, logprobs = found.get(chunk.choice_index, ("", [], []))
        joined = (text + chunk.text, [*ids, *chunk.token_ids], [*logprobs, *chunk.logprobs])
        found[chunk.choice_index] = joined
    return found


def _pause(workers: Workers, **fields: Any) -> tuple[ScriptedEngine, Future[Any]]:
    """A worker in the middle of a completion, and its answer to come."""
    engine = workers.add(script=ALPHABET, pause_after=4)
    answer = start(lambda: complete(workers.stack, prompt="x", max_tokens=12, **fields))
    workers.stack.wait_for(lambda: bool(engine.stuck), "the middle")
    return engine, answer


def test_an_unexpected_error_of_a_stream_does_not_lose_the_worker(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, answer = _pause(workers)
    (client,) = workers.stack.engines.clients

    def fail(message: FromEngine) -> None:
        raise ValueError("a fault of the gateway")

    monkeypatch.setattr(client, "take", fail)
    engine.pause_after = None
    assert answer.result(WAIT_S)["choices"][0]["text"] == "0abcdefghijk"
    assert engine.num_hellos == 2


def test_several_losses_in_a_row(workers: Workers) -> None:
    first, answer = _pause(workers)
    second = workers.add(script=ALPHABET, pause_after=1)
    workers.stop(first)
    workers.stack.wait_for(lambda: bool(second.stuck), "the second attempt")
    third = workers.add(script=ALPHABET)
    workers.stop(second)
    (choice,) = answer.result(WAIT_S)["choices"]
    assert choice["text"] == "0abcdefghijk"
    assert [request.attempt for request in third.requests] == [2]
    assert [len(ids) for ids in third.requests[0].output_so_far] == [5]


def test_a_request_waits_for_a_worker_in_place_of_the_only_one(workers: Workers) -> None:
    engine, answer = _pause(workers)
    workers.stop(engine)
    workers.stack.wait_for(lambda: not workers.stack.engines.clients, "the loss")
    workers.publish("RECOVERING")
    workers.publish("DEGRADED")
    assert not answer.done()
    workers.add(script=ALPHABET)
    assert answer.result(WAIT_S)["choices"][0]["text"] == "0abcdefghijk"


@pytest.mark.parametrize("stream", quick_rows({True}, [False, True]))
def test_without_another_worker_it_ends_as_unavailable_at_its_deadline(
    workers: Workers, stream: bool
) -> None:
    engine = workers.add(script=ALPHABET, pause_after=4)
    body = {"prompt": "x", "max_tokens": 12, "stream": stream}
    headers = {"x-request-timeout-ms": "3000"}  # on a busy machine the middle is reached late
    answer = start(lambda: workers.stack.http.post("/v1/completions", json=body, headers=headers))
    workers.stack.wait_for(lambda: bool(engine.stuck), "the middle")
    workers.stop(engine)
    response = answer.result(WAIT_S)
    assert response.status_code == (200 if stream else 503)
    assert '"code":"not_ready"' in response.text
    assert "no other worker was ready before the deadline" in response.text
    if not stream:
        assert int(response.headers["retry-after"]) >= 1
    workers.add(script=ALPHABET)
    assert complete(workers.stack, prompt="x", max_tokens=3)
    assert len(workers.engines["attention-1"].requests) == 1


def test_grpc_ends_as_unavailable_with_a_retry_time(workers: Workers) -> None:
    engine = workers.add(script=ALPHABET, pause_after=4)
    workers.stack.gateway.limits = dataclasses.replace(
        workers.stack.gateway.limits, request_timeout_s=3.0
    )
    request = request_of(text="x", sampling_params={"max_tokens": 12})
    with grpc.insecure_channel(workers.stack.grpc_target) as channel:
        call = InferenceStub(channel).Generate.future(request, timeout=WAIT_S)
        workers.stack.wait_for(lambda: bool(engine.stuck), "the middle")
        workers.stop(engine)
        code, _, details = failure(call.result)
    assert code is grpc.StatusCode.UNAVAILABLE
    assert details["ErrorInfo"].reason == "not_ready"
    assert details["RetryInfo"].retry_delay.seconds >= 1


def test_a_client_that_leaves_while_its_request_waits(workers: Workers) -> None:
    engine = workers.add(script=ALPHABET, pause_after=4)
    body: dict[str, object] = {"prompt": "x", "max_tokens": 12, "stream": True}
    connection = send_raw(workers.stack, "/v1/completions", body)
    workers.stack.wait_for(lambda: bool(engine.stuck), "the middle")
    workers.stop(engine)
    workers.stack.wait_for(lambda: not workers.stack.engines.clients, "the loss")
    connection.close()
    workers.stack.wait_no_requests()
    second = workers.add(script=ALPHABET)
    complete(workers.stack, prompt="y", max_tokens=1)
    assert [request.attempt for request in second.requests] == [0]


def test_a_worker_outside_the_generation_is_dropped_though_its_stream_is_open(
    workers: Workers,
) -> None:
    fenced, answer = _pause(workers)
    other = workers.add(script=ALPHABET, pause_after=2)
    workers.publish("DEGRADED", without=fenced.name)
    workers.stack.wait_for(lambda: bool(other.stuck), "the second attempt")
    fenced.pause_after = None  # it wakes up, and its tokens are late
    workers.stack.wait_for(lambda: fenced.num_streams == 0, "the end of its stream")
    other.pause_after = None
    assert answer.result(WAIT_S)["choices"][0]["text"] == "0abcdefghijk"
    assert [len(ids) for ids in other.requests[0].output_so_far] == [4]
    assert other.requests[0].num_deaths == 1


def test_what_a_draining_worker_hands_back_goes_on_elsewhere(workers: Workers) -> None:
    engine, answer = _pause(workers, n=2)
    other = workers.add(script=ALPHABET)
    engine.error, engine.pause_after = ("it drains", "draining"), None
    answers = answer.result(WAIT_S)["choices"]
    assert [choice["text"] for choice in answers] == ["0abcdefghijk"] * 2
    assert [request.attempt for request in other.requests] == [1]
    assert engine.aborts == [(other.requests[0].request_id, ())]
    metrics = workers.stack.gateway.metrics.render().decode()
    assert 'requests_replayed_total{cause="handed_back",model_name="tiny"} 1.0' in metrics


@pytest.mark.parametrize(
    ("state", "num_deaths"), [("DRAINED", 0), ("DRAINING", 0), ("LOADING", 0), ("LOST", 1)]
)
def test_only_a_lost_worker_has_died_with_its_requests(
    workers: Workers, state: str, num_deaths: int
) -> None:
    _, answer = _pause(workers)
    other = workers.add(script=ALPHABET)
    workers.publish("DEGRADED", attention_0=state)
    assert answer.result(WAIT_S)["choices"][0]["text"] == "0abcdefghijk"
    assert [request.num_deaths for request in other.requests] == [num_deaths]


def test_a_worker_that_ends_its_streams_has_not_died(workers: Workers) -> None:
    engine, answer = _pause(workers)
    other = workers.add(script=ALPHABET)
    workers.stack.run(engine.close_streams())
    assert answer.result(WAIT_S)["choices"][0]["text"] == "0abcdefghijk"
    assert [request.num_deaths for request in other.requests] == [0]


def _lose(workers: Workers, engine: ScriptedEngine, num_requests: int = 1) -> None:
    """It dies when it has this number of requests."""
    workers.stack.wait_for(lambda: len(engine.requests) == num_requests, "the requests")
    workers.stop(engine)
    workers.stack.wait_for(lambda: not workers.stack.engines.clients, "the loss")


def test_a_request_that_waits_in_an_engine_does_not_fail(workers: Workers) -> None:
    """Its deaths count, for workers do not report which requests a step has; it would run alone."""

    def add() -> ScriptedEngine:
        return workers.add(pause_after=0, reports=lambda r, stage: stage is RequestStage.QUEUED)

    def has_it() -> bool:
        (client,) = workers.stack.engines.clients
        return [e.stage for e in client.submissions] == [RequestStage.QUEUED]

    engine = add()
    answer = start(lambda: complete(workers.stack, prompt="x", max_tokens=4))
    for _ in range(MAX_TOTAL_UNACKNOWLEDGED_DEATHS + 1):
        workers.stack.wait_for(has_it, "the word of the engine")
        _lose(workers, engine)
        engine = add()
    workers.stack.wait_for(has_it, "the word of the last one")
    (last,) = engine.requests
    assert last.num_deaths == MAX_TOTAL_UNACKNOWLEDGED_DEATHS + 1
    engine.pause_after = None
    assert answer.result(WAIT_S)["choices"][0]["finish_reason"] == "length"


def _wait_for_prompt(workers: Workers, engine: ScriptedEngine, prompt: tuple[int, ...]) -> None:
    workers.stack.wait_for(lambda: prompt in [r.prompt for r in engine.requests], "the prompt")


def test_a_request_that_kills_on_receipt_fails_and_no_other(workers: Workers) -> None:
    killer = (7,)
    first = workers.add(pause_after=0, reports=lambda request, stage: False)
    poison = start(lambda: post(workers.stack, "/v1/completions", prompt=list(killer)))
    innocent = start(lambda: complete(workers.stack, prompt="x", max_tokens=4))
    _lose(workers, first, 2)
    second = workers.add(pause_after=0, reports=lambda request, stage: False)
    _lose(workers, second, 2)  # from now on one of them is sent at a time

    def only_queues(request: Request, stage: RequestStage) -> bool:
        return request.prompt != killer and stage is RequestStage.QUEUED

    for _ in range(MAX_TOTAL_UNACKNOWLEDGED_DEATHS - 2):
        engine = workers.add(pause_after=0, reports=only_queues)
        _wait_for_prompt(workers, engine, killer)
        workers.stop(engine)
        workers.stack.wait_for(lambda: not workers.stack.engines.clients, "the loss")
    workers.publish("DEGRADED")
    assert poison.result(WAIT_S).json()["error"]["code"] == "poisonous_request"
    last = workers.add(script=ALPHABET)
    assert innocent.result(WAIT_S)["choices"][0]["text"] == "0abc"
    (request,) = last.requests
    assert request.prompt != killer
    assert request.num_deaths == 2, "deaths with the killer on its way are the killer's"


def test_a_refused_request_comes_back_until_it_is_taken(workers: Workers) -> None:
    engine = workers.add(script=ALPHABET, error=("not yet", "not_ready"))
    answer = start(lambda: complete(workers.stack, prompt="x", max_tokens=2))
    workers.stack.wait_for(lambda: len(engine.requests) >= 3, "some attempts")
    engine.error = None
    assert answer.result(WAIT_S)["choices"][0]["text"] == "0a"


def test_a_request_goes_on_where_its_adapter_is(workers: Workers) -> None:
    workers.adapters()
    engine, answer = _pause(workers, model="sql")
    without, other = workers.add(script=ALPHABET), workers.add(script=ALPHABET, pause_after=2)
    workers.adapters(lacking=["attention-1"])
    workers.stop(engine)
    workers.stack.wait_for(lambda: bool(other.stuck), "the second attempt")
    workers.stop(other)
    workers.stack.wait_for(lambda: len(workers.stack.engines.clients) == 1, "the loss")
    complete(workers.stack, prompt="x", max_tokens=2)
    assert [request.adapter for request in without.requests] == [""]
    workers.adapters()
    assert answer.result(WAIT_S)["choices"][0]["text"] == "0abcdefghijk"
    assert [request.adapter for request in without.requests] == ["", "sql@0"]


def test_a_worker_that_turns_out_to_lack_the_adapter_hands_the_request_back(
    workers: Workers,
) -> None:
    workers.adapters()
    without = workers.add(script=ALPHABET, error=("it is not loaded", "model_not_found"))
    other = workers.add(script=ALPHABET)
    answer = complete(workers.stack, model="sql", prompt="x", max_tokens=3)
    assert answer["choices"][0]["text"] == "0ab"
    assert [len(engine.requests) for engine in (without, other)] == [1, 1]


def test_a_request_without_its_adapter_anywhere_fails(workers: Workers) -> None:
    workers.adapters()
    without = workers.add(script=ALPHABET, error=("it is not loaded", "model_not_found"))
    answer = post(workers.stack, "/v1/completions", model="sql", prompt="x")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert len(without.requests) == MAX_RETURNS_WITHOUT_ADAPTER + 1


def _lose_twice(workers: Workers) -> tuple[ScriptedEngine, Future[Any]]:
    """A request that two workers died with, at the third, noted as alone."""
    first = workers.add(script=ALPHABET, pause_after=0)
    answer = start(lambda: post(workers.stack, "/v1/completions", prompt="x", max_tokens=4))
    workers.stack.wait_for(lambda: bool(first.stuck), "the first attempt")
    second = workers.add(script=ALPHABET, pause_after=0)
    workers.stop(first)
    workers.stack.wait_for(lambda: bool(second.stuck), "the second attempt")
    third = workers.add(script=ALPHABET, pause_after=0)
    workers.stop(second)
    queue = workers.stack.engines.assignments  # the second worker may live: its connection is lost
    workers.stack.wait_for(lambda: len(queue.waiting) == 1, "the end of the second stream")
    workers.publish("DEGRADED")
    workers.stack.wait_for(lambda: bool(third.stuck), "the third attempt")
    assert [request.num_deaths for request in third.requests] == [2]
    assert [step.stage for step in third.solo_steps] == [SoloStage.OFFERED, SoloStage.CERTAIN]
    return third, answer


def test_the_request_that_was_alone_at_the_third_death_fails(workers: Workers) -> None:
    third, answer = _lose_twice(workers)
    fourth = workers.add(script=ALPHABET)
    workers.stop(third)
    workers.publish("DEGRADED")
    response = answer.result(WAIT_S)
    assert response.status_code == 500
    assert response.headers["x-should-retry"] == "false"
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("server_error", "poisonous_request")
    assert third.solo_steps[0].request_id in error["message"]
    assert complete(workers.stack, prompt="y", max_tokens=1)
    assert len(fourth.requests) == 1


def test_a_request_whose_connection_was_reset_three_times_is_innocent(workers: Workers) -> None:
    engine = workers.add(script=ALPHABET, pause_after=0)
    answer = start(lambda: post(workers.stack, "/v1/completions", prompt="x", max_tokens=4))
    for _ in range(3):
        workers.stack.wait_for(lambda: bool(engine.stuck), "the attempt")
        workers.stack.run(engine.reset_streams())
    engine.pause_after = None
    assert answer.result(WAIT_S).json()["choices"][0]["text"] == "0abc"
    assert [request.num_deaths for request in engine.requests] == [0, 0, 0, 0]


def test_a_request_that_was_alone_continues_if_its_worker_lives(workers: Workers) -> None:
    third, answer = _lose_twice(workers)
    workers.stack.run(third.reset_streams())
    third.pause_after = None
    assert answer.result(WAIT_S).json()["choices"][0]["text"] == "0abc"
    assert [request.num_deaths for request in third.requests] == [2, 2]


def test_a_token_clears_a_request(workers: Workers) -> None:
    third, answer = _lose_twice(workers)
    fourth = workers.add(script=ALPHABET)
    third.pause_after = 2
    workers.stack.wait_for(lambda: _is_decoding(workers, third), "a token")
    workers.stop(third)
    assert answer.result(WAIT_S).json()["choices"][0]["text"] == "0abc"
    assert [request.num_deaths for request in fourth.requests] == [1]


def _is_decoding(workers: Workers, engine: ScriptedEngine) -> bool:
    """Whether a token of a request came from a worker."""
    (client,) = [c for c in workers.stack.engines.clients if c.worker == engine.name]
    return client.load.num_decoding > 0


def test_the_pause_of_streams_is_reported(workers: Workers) -> None:
    engine, answer = _pause(workers)
    controller = workers.stack.controller
    other = workers.add(script=ALPHABET)
    workers.stop(engine)
    workers.stack.call(lambda: controller.change(generation=2))
    assert answer.result(WAIT_S)["choices"][0]["text"] == "0abcdefghijk"
    assert len(other.requests) == 1
    workers.stack.wait_for(lambda: bool(controller.pauses), "the report")
    ((generation, pause_s),) = controller.pauses
    assert generation == 2
    assert pause_s > 0
