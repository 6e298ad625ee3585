"""Calls with all kinds of sampling, for tests that compare every token."""

from __future__ import annotations

import json
import random
from dataclasses import replace

from gateway.core.call import CallKind, GenerateCall
from workers.requests.request import Grammar, GrammarKind

WORDS = Grammar(kind=GrammarKind.REGEX, text=r"([A-Z][a-z]{1,9}( [a-z]{1,9}){2,5}[.,] ){99}")
NUMBERS = Grammar(
    kind=GrammarKind.JSON_SCHEMA,
    text=json.dumps(
        {
            "type": "array",
            "items": {"type": "integer"},
            "minItems": 99,
            "x-guidance": {"whitespace_flexible": False},
        }
    ),
)


def make_calls(num_calls: int, num_tokens: int) -> list[GenerateCall]:
    """Return calls with all kinds of sampling and at least ``num_tokens`` output tokens each."""
    rng = random.Random(1)
    plain = GenerateCall(
        kind=CallKind.COMPLETION,
        min_tokens=num_tokens,
        max_tokens=num_tokens + 40,
        temperature=1.0,
        logprobs=2,
        ignore_eos=True,
        return_token_ids=True,
    )
    kinds: tuple[GenerateCall, ...] = (
        plain,
        replace(plain, temperature=0.0),
        replace(plain, frequency_penalty=0.6, presence_penalty=0.3, top_p=0.95),
        replace(plain, repetition_penalty=1.2, top_k=50, stop=("\n", ". ")),
        replace(plain, temperature=0.8, min_p=0.02, stop=("the", "ing", "q")),
        replace(plain, logit_bias=((10, 3.0), (11, -4.0)), stop=(" a", "e "), top_p=0.8),
        replace(plain, grammar=WORDS, frequency_penalty=0.2, stop=("er ", "st ")),
        replace(plain, grammar=NUMBERS, repetition_penalty=1.05),
    )
    return [
        replace(
            kinds[i % len(kinds)],
            seed=100 + i,
            prompts=(tuple(rng.randrange(4, 1000) for _ in range(rng.randint(3, 90))),),
        )
        for i in range(num_calls)
    ]
