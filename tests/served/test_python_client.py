"""``expertmesh.Client`` against a whole cluster, over both protocols."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.harness.server import Served
from expertmesh import LLM, AsyncClient, BadRequestError, Client, SamplingParams

pytestmark = pytest.mark.ray

PARAMS = SamplingParams(temperature=0, max_tokens=8, logprobs=2)
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_cluster_and_a_model_in_this_process_return_the_same(
    server: Served, protocol: str
) -> None:
    url = server.http if protocol == "http" else f"grpc://{server.grpc}"
    with LLM(dtype="float32", num_threads=1) as llm, Client(url) as client:
        for expected, found in (
            (llm.generate("ROMEO:", PARAMS), client.generate("ROMEO:", PARAMS)),
            (llm.chat(MESSAGES, PARAMS), client.chat(MESSAGES, PARAMS)),
        ):
            ours, theirs = expected[0].outputs[0], found[0].outputs[0]
            assert (ours.text, ours.token_ids) == (theirs.text, theirs.token_ids)
            assert ours.logprobs is not None
            assert theirs.logprobs is not None
            for mine, their in zip(ours.logprobs, theirs.logprobs, strict=True):
                values = {token: one.logprob for token, one in mine.items()}
                assert values == pytest.approx({t: one.logprob for t, one in their.items()})
        pieces = client.chat_stream(MESSAGES, PARAMS)
        assert "".join(p.outputs[0].text for p in pieces) == theirs.text
        vector = client.embed("ROMEO:")[0].outputs.embedding
        assert vector == pytest.approx(llm.embed("ROMEO:")[0].outputs.embedding, rel=1e-4)
        assert client.encode("ROMEO:")[0].outputs.data == pytest.approx(vector)
        with pytest.raises(BadRequestError, match="the model has no classes"):
            client.encode("ROMEO:", pooling_task="classify")
        with pytest.raises(BadRequestError, match="top_p"):
            client.generate("ROMEO:", SamplingParams(top_p=3))


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_an_async_client_streams(server: Served, protocol: str) -> None:
    url = server.http if protocol == "http" else f"grpc://{server.grpc}"

    async def call() -> None:
        async with AsyncClient(url) as client:
            (whole,) = await client.generate("ROMEO:", PARAMS)
            pieces = [piece async for piece in client.generate_stream("ROMEO:", PARAMS)]
        assert "".join(p.outputs[0].text for p in pieces) == whole.outputs[0].text

    asyncio.run(call())
