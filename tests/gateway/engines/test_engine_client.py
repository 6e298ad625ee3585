"""What an engine client does with the outputs of its worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable
from typing import Any, Self

import grpc
import pytest
from msgspec import structs

from cluster.core.errors import ExpertMeshError
from cluster.core.release import RELEASE
from gateway.cluster.view import AttentionEndpoint
from gateway.engines.engine_client import EngineClient
from gateway.engines.engine_stream import PING_S, EngineStream, StreamEnd
from gateway.engines.stream_events import RequestChange, RequestEvent, StreamEvent, StreamEvents
from gateway.engines.submission import RequestStage, Submission
from tests.gateway.fakes import CLUSTER_TOKEN, ScriptedEngine
from tests.gateway.stack import WAIT_S
from tests.workers.process.test_gateway_silence import FACTS
from workers.requests.request import (
    FinishReason,
    Request,
    SamplingParams,
    SoloStage,
    SoloStep,
    StepOutput,
    TokenLogprob,
    TokenOutput,
)
from workers.requests.stream_handshake import WorkerHandshake
from workers.requests.wire import TO_ENGINE, Abort, ToEngine


class ListSink:
    """Keeps its calls."""

    def __init__(self) -> None:
        self.outputs: list[TokenOutput] = []
        self.errors: list[ExpertMeshError] = []
        self.on_put: Callable[[], None] = lambda: None

    def put(self, output: TokenOutput) -> None:
        self.outputs.append(output)
        self.on_put()

    def fail(self, error: ExpertMeshError) -> None:
        self.errors.append(error)


class EventLog:
    """Keeps the events of a stream."""

    def __init__(self) -> None:
        self.changes: list[tuple[RequestChange, str]] = []
        self.events = StreamEvents(self._handle)

    def _handle(self, event: StreamEvent) -> None:
        if isinstance(event, RequestEvent):
            self.changes.append((event.change, event.entry.request.request_id))

    def requests(self, change: RequestChange) -> list[str]:
        """Requests with this change."""
        return [name for one, name in self.changes if one is change]

    @property
    def settled(self) -> list[str]:
        return self.requests(RequestChange.PROMPT_SETTLED)

    @property
    def computed_prompts(self) -> list[str]:
        return self.requests(RequestChange.PROMPT_COMPUTED)


def _client(attempt: int = 1, n: int = 2) -> tuple[EngineClient, ListSink]:
    client, sink = _client_to("nowhere:1", "t"), ListSink()
    params = SamplingParams(max_tokens=10)
    request = Request(request_id="r", prompt=(1, 2, 3), params=params, n=n, attempt=attempt)
    client.submit(Submission(request, sink, 1000.0))
    return client, sink


def _client_to(address: str, token: str, ping_s: float = PING_S) -> EngineClient:
    return _new_client(EventLog(), address, token, ping_s)


def _new_client(
    log: EventLog, address: str = "nowhere:1", token: str = "t", ping_s: float = PING_S
) -> EngineClient:
    endpoint = AttentionEndpoint("attention-0", address, 1)
    stream = EngineStream(endpoint, token=token, gateway="gateway-0", ping_s=ping_s)
    return EngineClient(stream, log.events)


def _output(
    choice: int, index: int, *tokens: int, attempt: int = 1, end: bool = False
) -> TokenOutput:
    return TokenOutput(
        request_id="r",
        attempt=attempt,
        choice=choice,
        index=index,
        token_ids=tokens,
        logprobs=tuple(TokenLogprob(token_id=token, logprob=-1.0) for token in tokens),
        finish_reason=FinishReason.LENGTH if end else None,
    )


def _step(client: EngineClient, *outputs: TokenOutput) -> None:
    client.take(StepOutput(outputs=outputs))


async def _sent(client: EngineClient, count: int) -> list[ToEngine]:
    """The first messages to the worker after the handshake."""
    messages, worker = client.stream.messages(), WorkerHandshake("t", "attention-0", RELEASE)
    client.stream.take_challenge(worker.challenge(await anext(messages)))
    worker.finish(await anext(messages), FACTS)
    return [TO_ENGINE.decode(await anext(messages)) for _ in range(count)]


def test_outputs_of_an_older_attempt_are_dropped() -> None:
    client, sink = _client(attempt=1)
    _step(client, _output(0, 0, 5, attempt=0))
    assert not sink.outputs


def test_repeated_tokens_are_dropped() -> None:
    client, sink = _client()
    _step(client, _output(0, 0, 5, 6), _output(0, 1, 6, 7), _output(0, 3, 8))
    assert [(o.index, o.token_ids) for o in sink.outputs] == [(0, (5, 6)), (2, (7,)), (3, (8,))]
    assert [entry.token_id for o in sink.outputs for entry in o.logprobs] == [5, 6, 7, 8]


def test_first_tokens_are_handed_over_first() -> None:
    client, sink = _client()
    _step(client, _output(0, 0, 5))
    _step(client, _output(0, 1, 6), _output(1, 0, 7), _output(1, 1, 8), _output(0, 2, 9))
    assert [token for o in sink.outputs for token in o.token_ids] == [5, 7, 6, 8, 9]


def test_a_gap_means_another_attempt(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    log, sink = EventLog(), ListSink()
    client = _new_client(log)
    params = SamplingParams(max_tokens=10)
    request = Request(request_id="r", prompt=(1, 2, 3), params=params, n=2, attempt=1)
    entry = Submission(request, sink, 1000.0)
    client.submit(entry)
    _step(client, _output(0, 0, 5), _output(1, 0, 6))
    _step(client, _output(0, 2, 7), _output(1, 1, 8))  # index 1 of choice 0 is missing
    assert log.requests(RequestChange.RETURNED) == ["r"]
    assert "outputs are missing" in caplog.text
    assert client.take_submissions() == []
    assert not sink.errors
    sent = asyncio.run(_sent(client, 2))
    assert sent[1] == Abort(request_id="r")
    assert entry.is_waiting
    entry.next_attempt(0.0)
    assert entry.message(0.0).output_so_far == ((5,), (6,))
    client.submit(entry)
    _step(client, _output(0, 1, 9, attempt=2), _output(0, 3, 7))
    assert [output.token_ids for output in sink.outputs] == [(5,), (6,), (9,)]


def test_outstanding_tokens_follow_the_work() -> None:
    client, _ = _client()
    assert client.load.outstanding_tokens == 3 + 20
    _step(client, _output(0, 0, 5))
    assert client.load.outstanding_tokens == 19
    _step(client, _output(0, 1, 6, end=True))
    assert client.load.outstanding_tokens == 10
    _step(client, _output(1, 0, 6, end=True))
    assert client.load.outstanding_tokens == 0
    assert client.take_submissions() == []


def test_the_load_has_the_outstanding_tokens_of_every_request() -> None:
    """Counted as they change: a sum over all requests for each new one would walk all of them."""
    draw = random.Random(2)
    for _ in range(200):
        client, _ = _client()
        (entry,) = client.submissions
        for _ in range(draw.randint(1, 12)):
            choice = draw.randrange(2)
            if draw.random() < 0.1:
                client.abort("r", draw.choice([(), (choice,)]))
            elif draw.random() < 0.1 and entry.stream is client:
                client.detach(entry)  # moves away and returns
                client.submit(entry)
            else:
                index, is_end = len(entry.outputs[choice]), draw.random() < 0.1
                _step(client, _output(choice, index, *[5] * draw.randint(0, 3), end=is_end))
            expected = sum(one.outstanding_tokens for one in client.submissions)
            assert client.load.outstanding_tokens == expected


def test_a_request_that_is_aborted_while_it_gets_a_token_has_no_load() -> None:
    client, sink = _client()
    _step(client, _output(0, 0, 5))
    sink.on_put = lambda: client.abort("r")
    _step(client, _output(0, 1, 5))
    assert client.submissions == []
    assert client.load.outstanding_tokens == client.load.num_decoding == 0


def test_aborted_choices_get_no_more_output() -> None:
    client, sink = _client()
    client.abort("r", (0,))
    _step(client, _output(0, 0, 5), _output(1, 0, 6))
    assert [output.choice for output in sink.outputs] == [1]
    client.abort("r")
    client.abort("r")
    _step(client, _output(1, 1, 7))
    assert len(sink.outputs) == 1
    last = Request(request_id="last", prompt=(1,), params=SamplingParams(max_tokens=1))
    client.submit(Submission(last, sink, 1000.0))
    sent = asyncio.run(_sent(client, 4))
    assert [type(message) for message in sent] == [Request, Abort, Abort, Request]


def test_what_was_lost_can_be_sent_again() -> None:
    client, _ = _client()
    _step(client, _output(0, 0, 5, 6))
    (lost,) = client.take_submissions()
    assert lost.outputs == [[5, 6], []]
    assert lost.open_choices == {0, 1}
    assert lost.is_waiting
    lost.next_attempt(0.0)
    again = lost.message(0.0)
    assert (again.attempt, again.output_so_far, again.closed_choices) == (2, ((5, 6), ()), ())


def test_choices_that_ended_are_not_asked_for_again() -> None:
    client, sink = _client(n=3)
    _step(client, _output(0, 0, 5, end=True), _output(1, 0, 6), _output(2, 0, 7))
    client.abort("r", (2,))
    (lost,) = client.take_submissions()
    lost.next_attempt(0.0)
    again = lost.message(0.0)
    assert (again.output_so_far, again.closed_choices) == (((5,), (6,), (7,)), (0, 2))
    other = _client_to("nowhere:2", "t")
    other.submit(lost)
    _step(client, _output(1, 1, 9))
    _step(other, _output(1, 1, 8, attempt=1))
    assert [o.token_ids for o in sink.outputs] == [(5,), (6,), (7,)]  # both are late
    _step(other, _output(1, 0, 6, 10, attempt=2, end=True), _output(0, 1, 11, attempt=2))
    assert [o.token_ids for o in sink.outputs] == [(5,), (6,), (7,), (10,)]
    assert not lost.is_waiting
    assert other.take_submissions() == []


@pytest.mark.parametrize(
    ("attempt", "code", "is_back"),
    [
        (0, "draining", True),
        (0, "not_ready", True),
        (0, "queue_full", False),
        (1, "queue_full", True),
        (1, "invalid_value", False),
    ],
)
def test_what_another_worker_can_do_is_handed_back(
    attempt: int, code: str, is_back: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    log = EventLog()
    client = _new_client(log)
    sink = ListSink()
    request = Request(request_id="r", prompt=(1,), params=SamplingParams(), n=2, attempt=attempt)
    client.submit(Submission(request, sink, 1000.0))
    error = structs.replace(
        _output(0, 0, attempt=attempt),
        finish_reason=FinishReason.ERROR,
        error="in its words",
        error_code=code,
    )
    _step(client, error, structs.replace(error, choice=1))
    assert log.requests(RequestChange.RETURNED) == (["r"] if is_back else [])
    assert ("in its words" in caplog.text) is is_back
    assert len(sink.outputs) == (0 if is_back else 2)


def test_a_wrong_token_is_refused() -> None:
    async def work() -> tuple[StreamEnd, StreamEnd]:
        engine = ScriptedEngine()
        await engine.start()
        wrong = _client_to(engine.address, "wrong")
        refused = await asyncio.wait_for(wrong.run(), WAIT_S)
        right = _client_to(engine.address, CLUSTER_TOKEN)
        task = asyncio.create_task(right.run())
        await asyncio.wait_for(right.stream.connected.wait(), WAIT_S)
        await engine.stop()
        return refused, await asyncio.wait_for(task, WAIT_S)

    refused, ended = asyncio.run(work())
    assert "UNAUTHENTICATED" in refused.reason
    assert not refused.has_died
    assert ended.has_died


def test_a_worker_of_another_release_is_refused_by_name() -> None:
    async def work() -> str:
        engine = ScriptedEngine(release="9.9.9")
        await engine.start()
        client = _client_to(engine.address, CLUSTER_TOKEN)
        end = await asyncio.wait_for(client.run(), WAIT_S)
        assert client.hello is None
        assert not client.stream.connected.is_set()
        await engine.stop()
        assert not end.has_died
        return end.reason

    told = f"release {RELEASE} of gateway-0, 9.9.9 of attention-0: releases must be equal"
    assert asyncio.run(work()) == f"UNAUTHENTICATED: {told}"


@pytest.mark.parametrize("is_first", [True, False])
def test_bytes_that_are_no_message_end_the_stream(is_first: bool) -> None:
    async def work() -> str:
        engine = ScriptedEngine(spoils="hello" if is_first else "pong")
        await engine.start()
        client = _client_to(engine.address, CLUSTER_TOKEN, ping_s=0.01)
        end = await asyncio.wait_for(client.run(), WAIT_S)
        await engine.stop()
        assert not end.has_died
        return end.reason

    what = "an engine's hello" if is_first else "a message of an engine"
    assert asyncio.run(work()).startswith(f"not {what}")


def test_an_unreachable_worker_ends_the_stream() -> None:
    client = _client_to("127.0.0.1:1", CLUSTER_TOKEN)
    end = asyncio.run(asyncio.wait_for(client.run(), WAIT_S))
    assert "UNAVAILABLE" in end.reason
    assert end.has_died


class _SwallowingCall:
    """As gRPC's when the call ends while it is cancelled: of the two, only the end is reported."""

    def __init__(self, messages: object) -> None:
        self._cancelled = asyncio.Event()

    async def read(self) -> Any:
        with contextlib.suppress(asyncio.CancelledError):
            await self._cancelled.wait()
        none = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, none, none, "refused", "")

    def cancel(self) -> None:
        self._cancelled.set()


class _SwallowingChannel:
    def __init__(self, *address_and_options: object, **options: object) -> None:
        pass

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        pass

    def stream_stream(self, path: str, *serializers: object) -> type[_SwallowingCall]:
        return _SwallowingCall


def test_a_cancellation_that_meets_the_end_of_the_call_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("grpc.aio.insecure_channel", _SwallowingChannel)

    async def end() -> None:
        task = asyncio.create_task(_client_to("127.0.0.1:1", "t").run())
        for _ in range(5):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(end())


def test_the_load_is_what_is_under_way() -> None:
    log, sink = EventLog(), ListSink()
    client = _new_client(log)
    request = Request(request_id="r", prompt=(1,) * 50, params=SamplingParams(max_tokens=9), n=2)
    entry = Submission(request, sink, 1000.0, missing_tokens=34)
    client.submit(entry)
    load = client.load
    assert (load.queued_tokens, load.num_decoding, log.settled) == (34, 0, [])
    _step(client, _output(0, 0, 5, attempt=0))
    assert (load.queued_tokens, load.num_decoding, log.settled) == (0, 2, ["r"])
    _step(client, _output(1, 0, 5, attempt=0, end=True))
    assert load.num_decoding == 1
    client.abort("r")
    assert (load.queued_tokens, load.num_decoding, log.settled) == (0, 0, ["r"])
    client.submit(Submission(structs.replace(request, request_id="s"), sink, 1000.0))
    client.submit(Submission(request, sink, 1000.0, missing_tokens=7))
    assert load.queued_tokens == 7
    assert len(client.take_submissions()) == 2
    assert (load.queued_tokens, load.num_decoding, log.settled) == (0, 0, ["r", "s", "r"])


def test_a_prompt_is_computed_once_and_only_where_its_request_goes_on() -> None:
    log = EventLog()
    client = _new_client(log)
    params = SamplingParams(max_tokens=10)
    request = Request(request_id="r", prompt=(1, 2, 3), params=params)
    client.submit(Submission(request, ListSink(), 1000.0))
    _step(client, _output(0, 0, 5, attempt=0))
    _step(client, _output(0, 1, 6, attempt=0))
    assert log.computed_prompts == ["r"]
    _step(client, _output(0, 2, 7, attempt=0, end=True))
    client.submit(Submission(request, ListSink(), 1000.0))
    _step(client, _output(0, 0, 5, attempt=0, end=True))
    client.submit(Submission(request, ListSink(), 1000.0))
    client.abort("r")
    assert log.computed_prompts == ["r"]


def _solo(stage: SoloStage, attempt: int = 1) -> SoloStep:
    return SoloStep(request_id="r", attempt=attempt, stage=stage)


def test_a_request_runs_alone_only_while_its_step_is_certain_and_not_over() -> None:
    """An offer may be withdrawn, and a step of others run, before the gateway hears of it."""

    async def work() -> None:
        client, _ = _client()
        entry = client._submissions["r"]
        client.stream._outgoing.get_nowait()  # the request
        seen = []
        for stage in SoloStage:
            client.take(_solo(stage))
            seen.append((entry.stage, client.stream._outgoing.get_nowait()))
        assert seen == [
            (RequestStage.SENT, _solo(SoloStage.OFFERED)),
            (RequestStage.ALONE, _solo(SoloStage.CERTAIN)),
            (RequestStage.QUEUED, _solo(SoloStage.OVER)),
        ]

    asyncio.run(work())


@pytest.mark.parametrize(
    ("stage", "is_answered"),
    [(SoloStage.OFFERED, False), (SoloStage.CERTAIN, True), (SoloStage.OVER, True)],
)
def test_a_worker_that_waits_for_an_acknowledgement_gets_one(
    stage: SoloStage, is_answered: bool
) -> None:
    """Also of an older attempt, or when the request has ended here: else it runs no step."""

    async def work() -> None:
        client, _ = _client()
        entry = client._submissions["r"]
        client.stream._outgoing.get_nowait()  # the request
        client.take(_solo(stage, attempt=0))
        assert entry.stage is RequestStage.SENT
        assert client.stream._outgoing.empty() is not is_answered

    asyncio.run(work())
