"""The sampling kernel for GPUs, against torch: the same tokens, to the last bit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.workers.cuda.device import DEVICE
from workers.cuda import draw as cuda_draw
from workers.native.draws import NUM_DRAW_INTEGERS
from workers.requests.request import SamplingParams
from workers.sampling.draws import NONE_ALLOWED, NOT_FINITE, as_integers, draw, draw_params
from workers.sampling.logits_processors import SamplingRow

DTYPES = [
    torch.bfloat16,
    torch.float32,
    pytest.param(torch.float16, marks=pytest.mark.slow),
]
PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(seed=-5),
    SamplingParams(seed=2**63 - 1, temperature=0.5, top_k=3),
    SamplingParams(seed=3, top_p=0.9),
    SamplingParams(seed=4, temperature=2.0, top_k=50, top_p=0.8, min_p=0.01),
    SamplingParams(seed=5, temperature=100.0, top_p=0.95),  # needs more than the first candidates
    SamplingParams(seed=6, min_p=0.1),
    SamplingParams(seed=7, temperature=3.0, top_k=1000),
    SamplingParams(seed=8, temperature=1e-4, top_k=5, top_p=0.5),
    SamplingParams(seed=9, temperature=3.0, top_p=1e-4),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in a row of logits that is short enough for the interpreter."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(cuda_draw, "_TILE", 1024)


def rows_of(params: Sequence[SamplingParams]) -> list[SamplingRow]:
    return [SamplingRow(own, choice=i, index=7 * i) for i, own in enumerate(params)]


def on_gpu(logits: Tensor, rows: Sequence[SamplingRow], is_masked: bool = False) -> list[int]:
    params = torch.from_numpy(as_integers(draw_params(rows)))
    by_column = params.t().contiguous().to(DEVICE).t()  # as in a captured step
    tokens: list[int] = cuda_draw.draw_rows(logits.to(DEVICE), by_column, is_masked).tolist()
    return tokens


@pytest.mark.parametrize("vocab_size", [7, 2500])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_those_of_torch(dtype: torch.dtype, vocab_size: int) -> None:
    rows = rows_of(PARAMS)
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(len(rows), vocab_size, generator=generator) * 3).to(dtype)
    assert on_gpu(logits, rows) == draw(logits, rows).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [4097, 50_304, 151_936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tokens_of_whole_vocabularies_are_those_of_torch(
    dtype: torch.dtype, vocab_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_draw, "_TILE", 4096)
    rows = rows_of(PARAMS)
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(len(rows), vocab_size, generator=generator) * 3).to(dtype)
    assert on_gpu(logits, rows) == draw(logits, rows).tolist()


@pytest.mark.parametrize(("dtype", "step"), [(torch.bfloat16, -0.25), (torch.float32, 0.0)])
def test_ties_with_the_last_token_are_kept(dtype: torch.dtype, step: float) -> None:
    """Three of four logits are equal, below zero and at both zeros."""
    logits = torch.full((len(PARAMS), 1500), step, dtype=dtype)
    logits[:, ::4] -= 1
    logits[:, 1::8] = -logits[:, 1::8] if step == 0 else step
    rows = rows_of(PARAMS)
    assert on_gpu(logits, rows) == draw(logits, rows).tolist()


def test_a_greedy_row_gets_the_lowest_of_its_best_tokens() -> None:
    logits = torch.zeros(2, 2500)
    logits[0, [1300, 276, 2400]] = 1.0
    assert on_gpu(logits, rows_of([PARAMS[0]] * 2)) == [276, 0]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_that_is_not_finite_has_no_token(dtype: torch.dtype, wrong: float) -> None:
    rows = rows_of(PARAMS[:5])
    logits = torch.arange(5 * 1200.0).reshape(5, 1200).remainder(17).to(dtype)
    logits[1, 1100], logits[3, 0] = wrong, wrong
    found = on_gpu(logits, rows)
    assert found == draw(logits, rows).tolist()
    assert [found[1], found[3]] == [NOT_FINITE] * 2
    assert min(found[0], found[2], found[4]) >= 0


def test_forbidden_tokens_are_not_sampled() -> None:
    rows = rows_of(PARAMS)
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(len(rows), 1200, generator=generator)
    logits[:, ::3] = float("-inf")
    logits[:, 5:] = torch.where(logits[:, 5:] > 0.5, logits[:, 5:], float("-inf"))
    logits[4] = float("-inf")
    found = on_gpu(logits, rows, is_masked=True)
    assert found == draw(logits, rows, is_masked=True).tolist()
    assert found[4] == NONE_ALLOWED


def test_no_rows_need_no_kernel() -> None:
    params = torch.empty(0, NUM_DRAW_INTEGERS, dtype=torch.int64, device=DEVICE)
    assert cuda_draw.draw_rows(torch.empty(0, 50, device=DEVICE), params, False).tolist() == []
