"""What an engine client does with the outputs of its worker."""

from __future__ import annotations

import asyncio

import pytest

from cluster.errors import ExpertMeshError, RequestFailedError
from gateway.engine_client import EngineClient
from gateway.output_queue import OutputQueue
from tests.gateway.fakes import CLUSTER_TOKEN, ScriptedEngine
from workers.request import (
    FinishReason,
    Request,
    SamplingParams,
    StepOutput,
    TokenLogprob,
    TokenOutput,
)


class ListSink:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.outputs: list[TokenOutput] = []
        self.errors: list[ExpertMeshError] = []

    def put(self, output: TokenOutput) -> None:
        self.outputs.append(output)

    def fail(self, error: ExpertMeshError) -> None:
        self.errors.append(error)


def _client(attempt: int = 1, n: int = 2) -> tuple[EngineClient, ListSink]:
    client, sink = EngineClient("attention-0", "nowhere:1", "t", "g"), ListSink()
    params = SamplingParams(max_tokens=10)
    request = Request(request_id="r", prompt=(1, 2, 3), params=params, n=n, attempt=attempt)
    client.submit(request, sink)
    return client, sink


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
    client._take_step(StepOutput(outputs=outputs))


def test_outputs_of_an_older_attempt_are_dropped() -> None:
    client, sink = _client(attempt=1)
    _step(client, _output(0, 0, 5, attempt=0))
    assert not sink.outputs


def test_repeated_tokens_are_dropped() -> None:
    client, sink = _client()
    _step(client, _output(0, 0, 5, 6), _output(0, 1, 6, 7), _output(0, 3, 8))
    assert [(o.index, o.token_ids) for o in sink.outputs] == [(0, (5, 6)), (2, (7,)), (3, (8,))]
    assert [entry.token_id for o in sink.outputs for entry in o.logprobs] == [5, 6, 7, 8]


def test_a_gap_fails_the_request() -> None:
    client, sink = _client()
    _step(client, _output(0, 1, 5))
    assert isinstance(sink.errors[0], RequestFailedError)
    assert client.take_submissions() == []


def test_outstanding_tokens_follow_the_work() -> None:
    client, _ = _client()
    assert client.outstanding_tokens == 3 + 20
    _step(client, _output(0, 0, 5))
    assert client.outstanding_tokens == 19
    _step(client, _output(0, 1, 6, end=True))
    assert client.outstanding_tokens == 10
    _step(client, _output(1, 0, 6, end=True))
    assert client.outstanding_tokens == 0
    assert client.take_submissions() == []


def test_aborted_choices_are_told_no_more() -> None:
    client, sink = _client()
    client.abort("r", (0,))
    _step(client, _output(0, 0, 5), _output(1, 0, 6))
    assert [output.choice for output in sink.outputs] == [1]
    client.abort("r")
    client.abort("r")
    _step(client, _output(1, 1, 7))
    assert len(sink.outputs) == 1
    assert client._outgoing.qsize() == 3  # the request, and one abort each


def test_what_was_lost_can_be_sent_again() -> None:
    client, _ = _client()
    _step(client, _output(0, 0, 5, 6))
    (lost,) = client.take_submissions()
    assert lost.outputs == [[5, 6], []]
    assert lost.open_choices == {0, 1}


def test_a_wrong_token_is_refused() -> None:
    async def work() -> tuple[str, str]:
        engine = ScriptedEngine()
        await engine.start()
        wrong = EngineClient("attention-0", engine.address, "wrong", "g")
        refused = await asyncio.wait_for(wrong.run(), 5.0)
        right = EngineClient("attention-0", engine.address, CLUSTER_TOKEN, "g")
        task = asyncio.create_task(right.run())
        await asyncio.wait_for(right.connected.wait(), 5.0)
        await engine.stop()
        return refused, await asyncio.wait_for(task, 5.0)

    refused, ended = asyncio.run(work())
    assert "UNAUTHENTICATED" in refused
    assert ended


def test_nobody_there_ends_the_stream() -> None:
    client = EngineClient("attention-0", "127.0.0.1:1", CLUSTER_TOKEN, "g")
    assert "UNAVAILABLE" in asyncio.run(asyncio.wait_for(client.run(), 5.0))


def test_queues_are_bounded() -> None:
    async def work() -> None:
        queue = OutputQueue(limit=2)
        for index in range(3):
            queue.put(_output(0, index, 5))
        assert len(await queue.take(1.0)) == 2
        with pytest.raises(RequestFailedError, match="too slowly"):
            await queue.take(1.0)

    asyncio.run(work())


def test_an_empty_queue_gives_nothing_in_time() -> None:
    async def work() -> list[TokenOutput]:
        return await OutputQueue().take(0.01)

    assert asyncio.run(work()) == []
