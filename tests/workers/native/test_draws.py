"""The kernel draws the tokens of its reference, and a row's whatever its company is."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.workers.native.builds import NAMES, team
from tests.workers.sampling.sampling_reference import sample
from workers.requests.request import SamplingParams
from workers.sampling.draws import NONE_ALLOWED, NOT_FINITE, draw
from workers.sampling.logits_processors import SamplingRow
from workers.sampling.sampler import logprob_entries_by_row

pytestmark = pytest.mark.heavy

SIZES = [1, 2, 15, 16, 17, 255, 256, 257, 1000, 4097, 50304, 70001]
"""Vocabularies around the widths of vectors, of spans of sums and of the levels of the walk."""
DTYPES = [torch.float32, torch.bfloat16]
LIMITS: list[dict[str, Any]] = [
    {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    for top_k, top_p, min_p in itertools.product((0, 1, 50, 700), (1.0, 0.9, 0.3), (0.0, 0.05))
]
GREEDY = {"temperature": 0.0}


def rows_of(temperature: float, repeats: int = 1) -> list[SamplingRow]:
    """Every combination of limits and the best token, each with numbers of its own."""
    each = [{"temperature": temperature, **limits} for limits in LIMITS] + [GREEDY]
    return [
        SamplingRow(SamplingParams(seed=31 * i - 5, **settings), choice=i % 3, index=i)
        for i, settings in enumerate(each * repeats)
    ]


def logits_of(kind: str, rows: int, size: int) -> Tensor:
    """float32 [rows, size]."""
    draws = torch.randn(rows, size, generator=torch.Generator().manual_seed(size))
    if kind == "steep":
        return draws * 6
    if kind == "ties":
        return draws.round()
    return draws * 1e-3  # flat


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_reference(name: str, size: int, dtype: torch.dtype) -> None:
    for kind, temperature in (("steep", 0.7), ("ties", 1.0), ("flat", 1.6), ("steep", 1e-5)):
        rows = rows_of(temperature)
        logits = logits_of(kind, len(rows), size).to(dtype)
        expected = draw(logits, rows)
        for num_threads in (1, 3):
            found = draw(logits, rows, team=team(name, num_threads))
            assert torch.equal(found, expected), (kind, num_threads)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_the_largest_vocabulary_are_those_of_the_reference(name: str) -> None:
    for kind, temperature in (("steep", 0.7), ("ties", 1.0), ("flat", 1.6)):
        rows = rows_of(temperature, repeats=8)
        logits = logits_of(kind, len(rows), 152064).to(torch.bfloat16)
        assert torch.equal(draw(logits, rows, team=team(name)), draw(logits, rows)), kind


@pytest.mark.parametrize("size", [17, 257, 5000])
@pytest.mark.parametrize("name", NAMES)
def test_masked_tokens_are_never_drawn(name: str, size: int) -> None:
    rows = rows_of(1.0)
    logits = logits_of("flat", len(rows), size)
    logits[:, torch.rand(size, generator=torch.Generator().manual_seed(3)) < 0.95] = -torch.inf
    logits[:, 2] = 0.0
    logits[3] = logits[-1] = -torch.inf
    expected = draw(logits, rows, is_masked=True)
    assert torch.equal(draw(logits, rows, is_masked=True, team=team(name)), expected)
    assert expected[3] == expected[-1] == NONE_ALLOWED
    assert (expected < 0).sum() == 2
    drawn = expected >= 0
    assert torch.isfinite(logits[drawn, expected[drawn]]).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 16, 299])  # of two vectors, and of the last, which is short
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_rows_that_are_not_finite_draw_nothing(
    name: str, dtype: torch.dtype, place: int, bad: float
) -> None:
    rows = [SamplingRow(SamplingParams(temperature=t), 0, 0) for t in (1.0, 1.0, 0.0, 0.0)]
    logits = logits_of("steep", 4, 300).to(dtype)
    logits[0, place] = logits[2, place] = bad
    found = draw(logits, rows, team=team(name)).tolist()
    assert [token == NOT_FINITE for token in found] == [True, False, True, False]
    assert found == draw(logits, rows).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_a_row_has_the_same_token_alone_and_in_any_batch(name: str) -> None:
    rows = rows_of(0.9)
    logits = logits_of("steep", len(rows), 3000)
    for drawing in (None, team(name), team(name, 2)):
        together = draw(logits, rows, team=drawing).tolist()
        alone = [int(draw(logits[i : i + 1], [row], team=drawing)) for i, row in enumerate(rows)]
        backwards = draw(logits.flip(0), rows[::-1], team=drawing).tolist()
        assert alone == together == backwards[::-1]


@pytest.mark.parametrize("name", NAMES)
def test_the_best_token_is_the_lowest_of_several(name: str) -> None:
    rows = [SamplingRow(SamplingParams(temperature=0.0), 0, 0)] * 4
    logits = torch.full((4, 3000), -5.0)
    logits[0, [2999, 1500, 1499]] = 3.0
    logits[1, [2999, 2998]] = 0.0
    logits[2, 7], logits[2, 9] = -0.0, 0.0
    found = draw(logits, rows, team=team(name)).tolist()
    assert found == draw(logits, rows).tolist() == [1499, 2998, 7, 0]


@pytest.mark.parametrize("name", NAMES)
def test_processors_and_logprobs_are_the_same_beside_the_kernel(name: str) -> None:
    each = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=3, logprobs=2),
        SamplingParams(temperature=0.0, logit_bias=((1, 99.0),)),
        SamplingParams(seed=4, top_k=2, allowed_token_ids=(5, 6, 7), logprobs=0),
        SamplingParams(seed=5, top_p=0.5),
    ]
    rows = [SamplingRow(params, 0, i) for i, params in enumerate(each)]
    rows.append(SamplingRow(SamplingParams(seed=1), 0, 0, banned_tokens=tuple(range(12))))
    logits = logits_of("steep", len(rows), 12)
    logits[4, 3] = float("nan")
    expected = sample(logits, rows)
    assert sample(logits, rows, team(name)) == expected
    assert sample(logits, rows, team(name), logprob_entries_by_row) == expected
    assert [drawn.token for drawn in expected[4:]] == [-1, -1]


@pytest.mark.parametrize("name", NAMES)
def test_other_types_are_drawn_by_torch(name: str) -> None:
    rows = rows_of(1.0)
    logits = logits_of("steep", len(rows), 500).to(torch.float16)
    assert torch.equal(draw(logits, rows, team=team(name)), draw(logits.float(), rows))
