"""Prompts of random tokens."""

from __future__ import annotations

import random

_FIRST = 4
"""Lowest token id that is used; lower ids may be special tokens."""


def random_prompts(seed: str, batch: int, num_tokens: int, limit: int = 1000) -> list[list[int]]:
    """Return ``batch`` prompts of tokens below ``limit``, equal for equal seeds.

    Every vocabulary that is measured has more tokens than the default limit.
    """
    draw = random.Random(seed)
    return [[draw.randrange(_FIRST, limit) for _ in range(num_tokens)] for _ in range(batch)]
