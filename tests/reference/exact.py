"""Outputs as bits, and requests of many kinds, for tests of ``--deterministic``."""

from __future__ import annotations

import random
import struct
from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from workers.requests.request import (
    FinishReason,
    Request,
    SamplingParams,
    TokenLogprob,
    TokenOutput,
)

LENGTHS = (1, 2, 3, 15, 16, 17, 40, 63, 64, 65, 100, 129)
"""Prompt lengths around the edges of blocks, tiles and products."""


def float_bits(value: float) -> str:
    """All 64 bits, so that neither rounding nor signs of zero are overlooked."""
    return struct.pack(">d", value).hex()


def _entry(entry: TokenLogprob | None) -> object:
    if entry is None:
        return None
    top = tuple((token, float_bits(value)) for token, value in entry.top)
    return (entry.token_id, float_bits(entry.logprob), entry.rank, top)


def exact(outputs: Sequence[TokenOutput]) -> tuple[object, ...]:
    """Everything that a client sees of one choice, comparable bit by bit."""
    assert outputs[-1].finish_reason is not FinishReason.ERROR, outputs[-1].error
    prompt = outputs[0].prompt_logprobs
    return (
        tuple(token for output in outputs for token in output.token_ids),
        tuple(_entry(entry) for output in outputs for entry in output.logprobs),
        None if prompt is None else tuple(map(_entry, prompt.entries())),
        outputs[-1].finish_reason,
    )


def mixed_requests(vocab_size: int, count: int = 32, max_tokens: int = 24) -> list[Request]:
    """Prompts of 1 to 129 tokens: greedy, sampled, and with penalties and limits."""
    draw = random.Random(7)
    requests = []
    for i in range(count):
        length = LENGTHS[i] if i < len(LENGTHS) else draw.randrange(1, 120)
        prompt = tuple(draw.randrange(4, vocab_size) for _ in range(length))
        requests.append(Request(request_id=f"r{i}", prompt=prompt, params=_params(i, max_tokens)))
    return requests


def _params(i: int, max_tokens: int) -> SamplingParams:
    shared = SamplingParams(
        max_tokens=max_tokens,
        ignore_eos=True,
        temperature=0.0,
        seed=i,
        logprobs=3,
        prompt_logprobs=1 if i % 2 else None,
    )
    if i % 3 == 0:
        return shared
    if i % 3 == 1:
        return replace(shared, temperature=1.0)
    return replace(
        shared, temperature=0.8, top_p=0.9, top_k=20, frequency_penalty=0.5, repetition_penalty=1.1
    )


def follow_ups(
    requests: Sequence[Request], bits: Mapping[str, tuple[object, ...]]
) -> list[Request]:
    """Second turns: what was asked and answered, then five tokens more, and nobody's prompt scored.

    ``bits`` are the answers of ``requests`` by id, as ``exact`` returns them.
    """
    found = []
    for request in requests:
        answer = bits[request.request_id][0]
        assert isinstance(answer, tuple)
        found.append(
            replace(
                request,
                request_id=f"{request.request_id}-again",
                prompt=(*request.prompt, *answer, *range(5, 10)),
                params=replace(request.params, prompt_logprobs=None, max_tokens=8),
            )
        )
    return found
