"""Perplexities of quantized weights, and the distribution of seeded draws."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness.local_engine import LocalEngine
from cluster.config.cluster import EngineSection
from cluster.config.model import Quantize, QuantizeLayers
from tests.real_model.reference import Reference
from workers.requests.request import Request, SamplingParams

WINDOW = 2048
NUM_CHOICES, NUM_SEEDS = 32, 64
"""Of draws of one position."""


@pytest.mark.parametrize(
    ("quantize", "layers", "most"),
    [
        ("none", "experts", 38.70),
        ("int8", "experts", 38.76),
        ("int8", "all", 38.90),
        ("int4", "experts", 39.5),
        ("int4", "all", 40.5),
    ],
)
def test_perplexity(
    reference: Reference, quantize: Quantize, layers: QuantizeLayers, most: float
) -> None:
    """Of 4,096 tokens in two windows; transformers has 38.677 in float32.

    Its matrices have 4 bits and a minimum already, which int4 rounds a second time.
    """
    document = reference.document(2 * WINDOW)
    engine = LocalEngine(
        reference.folders["mixtral"],
        dtype="float32",
        section=EngineSection(enable_prefix_caching=False),
        quantize=quantize,
        quantize_layers=layers,
    )
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    results = engine.generate([document[:WINDOW], document[WINDOW:]], params)
    scores = [p.logprob for r in results for p in r.prompt_logprobs or () if p is not None]
    assert len(scores) == 2 * (WINDOW - 1)
    perplexity = math.exp(-math.fsum(scores) / len(scores))
    print(f"perplexity of {quantize}, {layers}: {perplexity:.3f}")
    assert 38.6 < perplexity <= most


@pytest.fixture(scope="module")
def engine(reference: Reference) -> LocalEngine:
    section = EngineSection(max_waiting=NUM_CHOICES * NUM_SEEDS)
    return LocalEngine(reference.folders["mixtral"], dtype="float32", section=section)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 20},
        {"top_p": 0.8},
        {"min_p": 0.05},
        {"temperature": 1.3, "top_k": 50, "top_p": 0.9, "min_p": 0.02},
    ],
    ids=str,
)
def test_draws_have_the_probabilities_of_transformers(
    reference: Reference, engine: LocalEngine, fields: dict[str, Any]
) -> None:
    prompt = reference.document(33)  # two blocks, which the first request leaves, and a token
    engine.generate([prompt], SamplingParams(max_tokens=1))
    requests = [
        Request(
            request_id=f"{seed}",
            prompt=prompt,
            params=SamplingParams(max_tokens=1, seed=seed, ignore_eos=True, **fields),
            n=NUM_CHOICES,
        )
        for seed in range(NUM_SEEDS)
    ]
    outputs = engine.run(requests)
    drawn = [token for own in outputs.values() for output in own for token in output.token_ids]
    assert len(drawn) == NUM_CHOICES * NUM_SEEDS
    logits = reference.logits(prompt, len(prompt) - 1)
    assert chi_square_p(Counter(drawn), _probabilities(logits, fields)) > 1e-6


def _probabilities(logits: Tensor, fields: dict[str, Any]) -> Tensor:
    """[V], by the classes of transformers, in the order in which it has them."""
    from transformers.generation import logits_process as steps

    for name, make in (
        ("temperature", steps.TemperatureLogitsWarper),
        ("top_k", steps.TopKLogitsWarper),
        ("top_p", steps.TopPLogitsWarper),
        ("min_p", steps.MinPLogitsWarper),
    ):
        if name in fields:
            logits = make(fields[name])(torch.tensor([[0]]), logits)
    return logits.double().softmax(-1)[0]


def chi_square_p(counts: Counter[int], probabilities: Tensor) -> float:
    """Pearson's test: how probable counts at least as far off are. Tokens expected fewer than five
    times are one class."""
    num_draws = counts.total()
    found = torch.zeros_like(probabilities)
    found[list(counts)] = torch.tensor(list(counts.values()), dtype=found.dtype)
    assert not found[probabilities == 0].any(), "a token that cannot be drawn"
    expected = probabilities * num_draws
    is_own = expected >= 5
    expected = torch.cat([expected[is_own], expected[~is_own].sum()[None]])
    found = torch.cat([found[is_own], found[~is_own].sum()[None]])
    expected, found = expected[expected > 0], found[expected > 0]
    distance = ((found - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=distance.dtype)
    return float(torch.special.gammaincc(freedom, distance / 2))


def test_a_biased_draw_is_found() -> None:
    even = torch.full((4,), 0.25, dtype=torch.float64)
    assert chi_square_p(Counter({0: 1000, 1: 1010, 2: 990, 3: 1000}), even) > 0.5
    assert chi_square_p(Counter({0: 1200, 1: 960, 2: 920, 3: 920}), even) < 1e-6
