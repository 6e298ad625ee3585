"""Prompts of embeddings: the same as the tokens that they are the embeddings of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from benchmarks.harness.local_engine import LocalEngine
from cluster.config.cluster import EngineSection
from cluster.core.errors import RequestError
from workers.requests.inspection import InspectionParams
from workers.requests.prompt_embeds import PromptEmbeds, parse_embeds
from workers.requests.request import Request, SamplingParams

PROMPT = tuple(range(3, 33))
PARAMS = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
SECTIONS = {
    "whole": EngineSection(),
    "chunks": EngineSection(max_num_batched_tokens=7, max_num_seqs=3, block_size_tokens=4),
}


def embeds_of(engine: LocalEngine, prompt: tuple[int, ...]) -> PromptEmbeds:
    states = engine.inspect([prompt], InspectionParams(hidden_states=True))[0]["hidden_states"]
    return parse_embeds(tuple(states.shape[1:]), states[0].numpy().tobytes())


def request_of(embeds: PromptEmbeds, name: str = "given", **fields: object) -> Request:
    request = Request(
        request_id=name, prompt=(0,) * embeds.num_tokens, params=PARAMS, prompt_embeds=embeds
    )
    return replace(request, **fields)


def tokens_of(engine: LocalEngine, request: Request) -> list[tuple[int, ...]]:
    outputs = engine.run([request])
    return [
        tuple(t for o in outputs[request.request_id, choice] for t in o.token_ids)
        for choice in range(request.n)
    ]


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("name", SECTIONS)
def test_draws_what_the_tokens_draw(
    tiny_checkpoint: Path, name: str, num_micro_batches: int
) -> None:
    engine = LocalEngine(
        tiny_checkpoint, section=SECTIONS[name], num_micro_batches=num_micro_batches
    )
    want = engine.generate([PROMPT], PARAMS)[0].token_ids
    embeds = embeds_of(engine, PROMPT)
    assert tokens_of(engine, request_of(embeds, n=2)) == [want, want]
    resumed = request_of(embeds, "resumed", output_so_far=(want[:9],))
    assert tokens_of(engine, resumed) == [want[9:]]
    assert engine.engine.pool.num_free == engine.engine.pool.num_blocks


def test_prefixes_are_shared_by_content(tiny_checkpoint: Path) -> None:
    """All prompts of embeddings have the same tokens, zeros."""
    engine = LocalEngine(tiny_checkpoint, section=EngineSection(block_size_tokens=4))
    other = tuple(range(40, 70))
    for prompt in (PROMPT, other):
        want = engine.generate([prompt], PARAMS)[0].token_ids
        embeds = embeds_of(engine, prompt)
        hits = engine.engine.stats()["prefix_cache_hits_total"]
        assert tokens_of(engine, request_of(embeds)) == [want]
        assert engine.engine.stats()["prefix_cache_hits_total"] == hits
        assert tokens_of(engine, request_of(embeds)) == [want]
        assert engine.engine.stats()["prefix_cache_hits_total"] == hits + 28
    zeros = engine.generate([(0,) * 30], PARAMS)[0].token_ids
    assert tokens_of(engine, request_of(embeds_of(engine, (0,) * 30))) == [zeros]


def test_what_is_refused(tiny_checkpoint: Path) -> None:
    engine = LocalEngine(tiny_checkpoint)
    embeds = embeds_of(engine, PROMPT)
    narrow = PromptEmbeds(4, embeds.data)
    for request, text in (
        (request_of(narrow), "embeddings are 4 wide, the model's 32"),
        (request_of(embeds, prompt=(0,) * 29), "one row for each token"),
        (
            request_of(embeds, params=replace(PARAMS, repetition_penalty=1.1)),
            "cannot be combined with prompt_logprobs or repetition_penalty",
        ),
    ):
        with pytest.raises(RequestError, match=text):
            engine.add_request(request)
    assert not engine.engine.has_work


def test_bytes_are_checked() -> None:
    good = np.arange(6, dtype="<f4")
    assert parse_embeds((3, 2), good.tobytes()).rows(1, 3).tolist() == [[2, 3], [4, 5]]
    for shape, data, text in (
        ((3,), good.tobytes(), "must be tokens and hidden size"),
        ((0, 2), b"", "must be tokens and hidden size"),
        ((3, 3), good.tobytes(), "has 24 bytes, .* have 36"),
        ((3, 2), _with_infinity(good), "must be finite"),
    ):
        with pytest.raises(RequestError, match=text):
            parse_embeds(shape, data)


def _with_infinity(numbers: np.ndarray[tuple[int], np.dtype[np.float32]]) -> bytes:
    broken = numbers.copy()
    broken[4] = np.inf
    return broken.tobytes()
