"""Sampling the slow and plain way, in Python numbers, and the test that counts draws against it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

from torch import Tensor

from workers.native.thread_team import ThreadTeam
from workers.requests.request import SamplingParams
from workers.sampling.logits_processors import SamplingRow
from workers.sampling.sampler import (
    SampledToken,
    Score,
    logprob_entries,
    sample_tokens,
    sampled_tokens,
)

NEVER = -math.inf


def penalized(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> list[float]:
    """Logits after repetition, frequency and presence penalty, and bias, in this order."""
    found = list(logits)
    counts = Counter(output)
    for token in {*prompt, *output}:
        value = found[token]
        penalty = params.repetition_penalty
        value = value / penalty if value > 0 else value * penalty
        value -= params.frequency_penalty * counts[token]
        value -= params.presence_penalty * (counts[token] > 0)
        found[token] = value
    for token, bias in params.logit_bias:
        found[token] += bias
    return found


def masked(
    logits: Sequence[float],
    params: SamplingParams,
    output: Sequence[int],
    eos: Collection[int],
    follows: Collection[int] | None = None,
) -> list[float]:
    """Logits after all masks; ``follows`` is what a grammar allows."""
    banned = set[int]()
    if len(output) < params.min_tokens:
        banned |= {*params.stop_token_ids, *(() if params.ignore_eos else eos)}
    for word in params.bad_words:
        if tuple(output[len(output) - len(word) + 1 :]) == word[:-1]:
            banned.add(word[-1])
    allowed = set(params.allowed_token_ids) or set(range(len(logits)))
    if follows is not None:
        allowed &= set(follows)
    return [x if t in allowed - banned else NEVER for t, x in enumerate(logits)]


def distribution(logits: Sequence[float], params: SamplingParams) -> list[float]:
    """Probabilities after temperature, top_k, top_p and min_p."""
    values = [x / params.temperature for x in logits]
    kept = sorted(range(len(values)), key=lambda t: -values[t])
    if params.top_k:
        kept = kept[: params.top_k]
    largest = values[kept[0]]
    weights = {t: math.exp(values[t] - largest) for t in kept}
    total = sum(weights.values())
    probs = {t: weight / total for t, weight in weights.items()}
    mass, nucleus = 0.0, []
    for token in kept:
        nucleus.append(token)
        mass += probs[token]
        if mass >= params.top_p:
            break
    best = probs[kept[0]]
    nucleus = [t for t in nucleus if probs[t] >= params.min_p * best]
    mass = sum(probs[t] for t in nucleus)
    return [probs[t] / mass if t in nucleus else 0.0 for t in range(len(values))]


def assert_drawn_from(tokens: Iterable[int], probs: Sequence[float]) -> None:
    """Pearson's chi-square, five deviations wide; tokens of probability 0 never occur."""
    counts = Counter(tokens)
    num_draws = sum(counts.values())
    assert all(probs[token] > 0 for token in counts)
    expected = [p * num_draws for p in probs]
    large = [t for t, e in enumerate(expected) if e >= 5]
    chi_square = sum((counts[t] - expected[t]) ** 2 / expected[t] for t in large)
    freedom = max(len(large) - 1, 1)
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom) + 3


def sample(
    logits: Tensor,
    rows: Sequence[SamplingRow],
    team: ThreadTeam | None = None,
    score: Score = logprob_entries,
) -> list[SampledToken]:
    """One token per row of logits [rows, V], drawn and reported; ``team``: by a native kernel."""
    return sampled_tokens(logits, rows, sample_tokens(logits, rows, team).tolist(), score)
