"""Sampling against plain references: distributions by chi-square, order of operations by hand."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.workers.sampling.sampling_reference import (
    assert_drawn_from,
    distribution,
    penalized,
    sample,
)
from workers.requests.request import SamplingParams
from workers.sampling.draws import draw, token_weights, uniforms
from workers.sampling.logits_processors import SamplingRow, TokenCounts, penalize
from workers.sampling.sampler import (
    SamplingFailure,
    logprob_entries,
    logprob_entries_by_row,
)

pytestmark = pytest.mark.heavy

NUM_DRAWS = 4000
VOCAB = 12


def rows_of(params: SamplingParams, count: int) -> list[SamplingRow]:
    return [SamplingRow(params, choice=0, index=i) for i in range(count)]


def uniform(seed: int, choice: int, index: int, level: int = 0) -> float:
    """One number alone."""
    return float(uniforms(columns([(seed, choice, index)]), level + 1)[0, level])


def columns(rows: Sequence[tuple[int, int, int]]) -> NDArray[np.uint64]:
    """[rows, 3]: seed, choice and index."""
    return np.array([[n % 2**64 for n in row] for row in rows], dtype=np.uint64)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(seed=11),
        SamplingParams(seed=12, temperature=0.5),
        SamplingParams(seed=13, temperature=2.5),
        SamplingParams(seed=14, top_k=3),
        SamplingParams(seed=15, top_p=0.7),
        SamplingParams(seed=16, min_p=0.15),
        SamplingParams(seed=17, temperature=1.5, top_k=6, top_p=0.8, min_p=0.1),
        SamplingParams(seed=18, top_k=100),
    ],
)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(params.seed)) * 1.5
    tokens = draw(logits.expand(NUM_DRAWS, VOCAB), rows_of(params, NUM_DRAWS))
    assert_drawn_from(tokens.tolist(), distribution(logits.tolist(), params))


def test_top_p_beyond_the_first_candidates() -> None:
    size = 5000
    logits = torch.zeros(1, size)
    logits[0, 17] = 1e-3  # nearly flat: 90% of the mass needs thousands of tokens
    params = SamplingParams(seed=3, top_p=0.9)
    tokens = draw(logits.expand(200, size), rows_of(params, 200))
    assert len(set(tokens.tolist())) > 150


@pytest.mark.parametrize("size", [300, 5000])
def test_top_p_finds_its_last_token_among_thousands(size: int) -> None:
    logits = -torch.arange(float(size)) / size  # 90% of the mass is in the first 84% of the tokens
    weights = logits.double().exp()
    num_kept = int((weights.cumsum(0) < 0.9 * weights.sum()).sum()) + 1
    params = SamplingParams(seed=3, top_p=0.9)
    tokens = draw(logits.expand(3000, size), rows_of(params, 3000))
    assert 0.99 * num_kept < int(tokens.max()) < num_kept


def test_top_p_keeps_no_token_beyond_its_share() -> None:
    logits = torch.tensor([[4.0, 2.0, 1.0, 1.0]]).log().expand(100, 4)  # shares 1/2, 1/4, 1/8
    half, most = (SamplingParams(seed=5, top_p=share) for share in (0.5, 0.75))
    assert set(draw(logits, rows_of(half, 100)).tolist()) == {0}
    assert set(draw(logits, rows_of(most, 100)).tolist()) == {0, 1}


def test_top_p_is_a_share_of_what_top_k_keeps() -> None:
    logits = torch.tensor([[4.0, 2.0, 1.0, 1.0]]).log().expand(100, 4)  # of two: 2/3, 1/3
    two_thirds, more = (SamplingParams(seed=5, top_k=2, top_p=share) for share in (0.66, 0.67))
    assert set(draw(logits, rows_of(two_thirds, 100)).tolist()) == {0}
    assert set(draw(logits, rows_of(more, 100)).tolist()) == {0, 1}


def test_limits_keep_ties() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    params = SamplingParams(seed=5, top_k=2)
    tokens = draw(logits.expand(300, 5), rows_of(params, 300))
    assert set(tokens.tolist()) == {1, 2, 3}


def test_rows_do_not_depend_on_batch_mates() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 700, generator=generator)
    each = [
        SamplingParams(seed=1, temperature=0.0),
        SamplingParams(seed=2, temperature=0.7),
        SamplingParams(seed=3, top_k=5),
        SamplingParams(seed=4, top_p=0.97),
        SamplingParams(seed=5, min_p=0.01, logit_bias=((3, 4.0),)),
    ]
    rows = [SamplingRow(p, choice=i, index=7 * i) for i, p in enumerate(each)]
    together = [d.token for d in sample(logits, rows)]
    alone = [sample(logits[i : i + 1], [row])[0].token for i, row in enumerate(rows)]
    assert together == alone


@pytest.mark.parametrize("vocab_size", [1, 2, 15, 16, 17, 255, 256, 257, 1024, 5000])
def test_every_token_of_any_vocabulary_can_be_drawn(vocab_size: int) -> None:
    for token in {0, vocab_size // 2, vocab_size - 1}:
        logits = torch.full((1, vocab_size), -1e9)
        logits[0, token] = 3.0
        rows = rows_of(SamplingParams(seed=token), 20)
        assert set(draw(logits.expand(20, -1), rows).tolist()) == {token}


def test_rounding_hardly_changes_a_draw() -> None:
    """Rows that are served alone and in a batch differ by some 1e-6: see the module."""
    generator = torch.Generator().manual_seed(4)
    num_changed = 0
    for seed in range(10):
        logits = torch.randn(2000, 1024, generator=generator) * 3
        noise = torch.randn(2000, 1024, generator=generator) * 2e-6
        rows = rows_of(SamplingParams(seed=seed), 2000)
        num_changed += int((draw(logits, rows) != draw(logits + noise, rows)).sum())
    assert num_changed == 0  # one number for the whole distribution: 2 or 3


def test_same_seed_same_token_and_choices_differ() -> None:
    logits = torch.zeros(1, 1000)
    params = SamplingParams(seed=9)
    first = [draw(logits, [SamplingRow(params, 0, i)]).item() for i in range(20)]
    again = [draw(logits, [SamplingRow(params, 0, i)]).item() for i in range(20)]
    other = [draw(logits, [SamplingRow(params, 1, i)]).item() for i in range(20)]
    assert first == again
    assert len(set(first)) > 10
    assert first != other


def test_uniform_is_uniform() -> None:
    values = [uniform(seed, choice, i) for seed in range(8) for choice in (0, 1) for i in range(64)]
    assert all(0 <= u < 1 for u in values)
    assert abs(sum(values) / len(values) - 0.5) < 0.03
    bins = Counter(int(u * 8) for u in values)
    assert min(bins.values()) > 90
    assert uniform(-5, 0, 0) == uniform(-5, 0, 0)


def test_numbers_do_not_depend_on_what_is_drawn_with_them() -> None:
    rows = [(seed, choice, 3 * seed) for seed in (0, -5, 2**64 + 1) for choice in (0, 1)]
    together = uniforms(columns(rows), 5)
    for row, numbers in zip(rows, together.tolist(), strict=True):
        assert [uniform(*row, level) for level in range(5)] == numbers


def test_a_seed_gives_the_same_numbers_and_tokens_in_every_release() -> None:
    assert uniform(0, 0, 0) == 0.1296456182997474
    assert uniform(7, 1, 2, 3) == uniform(7 + 2**64, 1, 2, 3) == 0.10123025561781762
    assert uniform(-5, 0, 1) == 0.16513138876770495
    logits = torch.arange(5000).remainder(61).expand(8, -1) / 8
    rows = [SamplingRow(SamplingParams(seed=3), choice=i % 2, index=i) for i in range(8)]
    assert draw(logits, rows).tolist() == [4445, 602, 2923, 4265, 3827, 4940, 3778, 2682]


def test_even_the_lowest_random_number_draws_a_token_that_has_weight() -> None:
    params = SamplingParams(seed=-7763575511391931962)
    assert uniform(params.seed, 0, 0) == 0.0
    logits = torch.tensor([[-1e9, -1e9, 0.0, 1.0]])
    assert draw(logits, rows_of(params, 1)).tolist() == [2]


@pytest.mark.parametrize(
    ("vocab_size", "tokens"),
    [
        (12, [10, 8, 5, 10, 6, 2, 6, 7]),
        (16, [13, 12, 6, 13, 10, 3, 10, 11]),
        (256, [212, 178, 108, 220, 159, 34, 159, 164]),
    ],
)
def test_a_walk_has_as_many_levels_as_the_vocabulary_needs(
    vocab_size: int, tokens: list[int]
) -> None:
    logits = (torch.arange(vocab_size).remainder(7) / 4).expand(8, -1)
    assert draw(logits, rows_of(SamplingParams(seed=3), 8)).tolist() == tokens


def test_logprobs_are_those_of_drawn_tokens_where_asked_for() -> None:
    logits = torch.tensor([[3.0, 1.0], [3.0, 1.0], [float("nan"), 0.0], [3.0, 1.0]])
    numbers = (0, None, 1, 1)
    rows = [
        SamplingRow(SamplingParams(temperature=0.0, logprobs=number), 0, 0) for number in numbers
    ]
    drawn = sample(logits, rows)
    assert [d.token for d in drawn] == [0, 0, -1, 0]
    assert [None if d.logprob is None else len(d.logprob.top) for d in drawn] == [0, None, None, 1]


def test_top_k_keeps_the_best_of_few_and_of_many_tokens() -> None:
    logits = torch.arange(600.0).expand(400, -1) / 1000
    for top_k in (1, 2, 255, 256, 257, 599):
        tokens = draw(logits, rows_of(SamplingParams(seed=1, top_k=top_k), 400)).tolist()
        assert min(tokens) >= 600 - top_k
        assert len(set(tokens)) > min(top_k, 200) / 2


def test_limits_of_one_row_leave_the_others_alone() -> None:
    logits = torch.zeros(200, 8)
    for limited in (
        SamplingParams(top_k=1),
        SamplingParams(top_p=0.1),
        SamplingParams(min_p=0.5),
    ):
        rows = [*rows_of(SamplingParams(seed=1), 199), SamplingRow(limited, 0, 0)]
        assert set(draw(logits, rows)[:199].tolist()) == set(range(8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_lowest_id_of_a_tie(dtype: torch.dtype) -> None:
    logits = torch.tensor([[0.0, 2.0, 5.0, 5.0], [7.0, 7.0, 7.0, 7.0]], dtype=dtype)
    rows = rows_of(SamplingParams(temperature=0.0), 2)
    assert [d.token for d in sample(logits, rows)] == [2, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_only_the_row_with_bad_logits_fails(bad: float) -> None:
    logits = torch.zeros(3, 8)
    logits[1, 4] = bad
    logits[2, 5] = 1.0
    drawn = sample(logits, rows_of(SamplingParams(temperature=0.0), 3))
    assert [d.failure for d in drawn] == [None, SamplingFailure.NOT_FINITE, None]
    assert drawn[2].token == 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_an_allowed_token_fails_alone(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, seed=1)
    rows = [
        SamplingRow(params, 0, 0, banned_tokens=tuple(range(8))),
        SamplingRow(params, 0, 0, banned_tokens=tuple(range(7))),
    ]
    drawn = sample(torch.randn(2, 8), rows)
    assert [d.failure for d in drawn] == [SamplingFailure.NONE_ALLOWED, None]
    assert [d.token for d in drawn] == [-1, 7]


def test_only_temperatures_below_a_hundred_thousandth_are_greedy() -> None:
    logits = torch.zeros(50, 8)
    tiny, small = (SamplingParams(temperature=t, seed=1) for t in (0.99e-5, 1e-5))
    assert {d.token for d in sample(logits, rows_of(tiny, 50))} == {0}
    assert len({d.token for d in sample(logits, rows_of(small, 50))}) > 1


@pytest.mark.parametrize("temperature", [0.0, 1e-5, 1.0, 100.0])
@pytest.mark.parametrize("penalty", [1e-300, 1e-30, 2.0])
def test_extreme_penalties_and_temperatures_draw_a_token(
    temperature: float, penalty: float
) -> None:
    params = SamplingParams(temperature=temperature, repetition_penalty=penalty, seed=1)
    counts = TokenCounts(params, prompt=[1, 2, 3], output=[3, 4])
    (drawn,) = sample(torch.randn(1, 8) + 1, [SamplingRow(params, 0, 0, counts)])
    assert 0 <= drawn.token < 8


def test_only_logits_that_are_not_finite_draw_nothing() -> None:
    logits = torch.tensor([[1e38, -1e38, 0.0], [0.0, 1.0, 2.0], [float("nan"), 0.0, 0.0]])
    rows = rows_of(SamplingParams(temperature=1e-4, seed=1), 3)
    assert draw(logits, rows).tolist() == [0, 2, -1]


def test_weights_are_powers_of_two_in_whole_units() -> None:
    t = -torch.arange(0.0, 40.0, 0.37)
    exact = (t.double() + 40).exp2()
    assert ((token_weights(t) - exact).abs() <= 0.5 + 2e-7 * exact).all()
    assert token_weights(torch.tensor([0.0, -1.0, -40.0])).tolist() == [2**40, 2**39, 1]
    assert not token_weights(torch.tensor([-41.0, -1e9, -float("inf")])).any()


def test_penalties_in_order() -> None:
    params = SamplingParams(
        repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25, logit_bias=((4, 1.0),)
    )
    counts = TokenCounts(params, prompt=[0, 1], output=[1, 2, 2])
    logits = torch.tensor([4.0, 4.0, -4.0, 4.0, 4.0])
    penalize(logits.unsqueeze(0), [SamplingRow(params, 0, 0, counts)])
    # 0: prompt only. 1: prompt, once in the output. 2: twice in the output. 3 and 4: neither.
    assert logits.tolist() == [2.0, 2.0 - 0.5 - 0.25, -8.0 - 1.0 - 0.25, 4.0, 4.0]


def test_penalties_of_a_row_leave_the_others_alone() -> None:
    each = [
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(),
        SamplingParams(frequency_penalty=0.7),
        SamplingParams(presence_penalty=-0.4, repetition_penalty=0.8),
    ]
    logits = torch.randn(len(each), 200, generator=torch.Generator().manual_seed(6))
    rng = random.Random(6)
    outputs: list[list[int]] = [[] for _ in each]
    rows = []
    for number, (params, output) in enumerate(zip(each, outputs, strict=True)):
        counts = (
            TokenCounts(params, prompt=range(20 * number), output=output) if number != 1 else None
        )
        rows.append(SamplingRow(params, 0, 0, counts))
    for _ in range(40):  # arrays grow on the way
        for output in outputs:
            output += rng.choices(range(200), k=5)
        found = logits.clone()
        penalize(found, rows)
        for number, (params, output) in enumerate(zip(each, outputs, strict=True)):
            prompt = range(20 * number) if params.repetition_penalty != 1.0 else ()
            expected = penalized(logits[number].tolist(), params, list(prompt), output)
            if number == 1:
                expected = logits[number].tolist()
            assert found[number].tolist() == pytest.approx(expected, abs=1e-5)


def test_bias_and_ending_mask_steer_greedy_but_not_logprobs() -> None:
    logits = torch.tensor([[5.0, 4.0, 3.0, 0.0]])
    params = SamplingParams(temperature=0.0, logit_bias=((3, 4.5),), logprobs=2)
    row = SamplingRow(params, 0, 0, banned_tokens=(0,))
    (drawn,) = sample(logits, [row])
    assert drawn.token == 3
    assert drawn.logprob is not None
    raw = torch.log_softmax(logits[0], -1)
    assert drawn.logprob.logprob == pytest.approx(raw[3].item(), abs=1e-6)
    assert drawn.logprob.rank == 4
    assert [t for t, _ in drawn.logprob.top] == [0, 1]
    assert torch.equal(logits, torch.tensor([[5.0, 4.0, 3.0, 0.0]]))


def test_min_p_one_and_tiny_temperature_are_greedy() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.5]]).expand(50, 3)
    for params in (SamplingParams(min_p=1.0), SamplingParams(temperature=1e-30)):
        assert {d.token for d in sample(logits, rows_of(params, 50))} == {1}


def test_logprob_entries_rank_and_order() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 3.0, 0.0, 0.0]])
    first, second = logprob_entries(logits, [1, 1], [3, 0])
    assert (first.token_id, first.rank) == (1, 3)
    assert [t for t, _ in first.top] == [3, 2, 1]
    assert first.top[2][1] == pytest.approx(first.logprob)
    assert (second.rank, second.top) == (1, ())


def test_named_tokens_are_reported_in_their_order_in_place_of_the_best() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [3.0, 2.0, 1.0, 0.0]])
    logprobs = torch.log_softmax(logits, -1)
    first, second = logprob_entries(logits, [1, 1], [2, 1], [[2, 0], []])
    assert [token for token, _ in first.top] == [2, 0]
    assert [value for _, value in first.top] == pytest.approx(logprobs[0, [2, 0]].tolist())
    assert [token for token, _ in second.top] == [0]


def test_rows_that_take_the_best_token_are_drawn_beside_the_others() -> None:
    logits = torch.randn(7, VOCAB, generator=torch.Generator().manual_seed(4))
    logits[5, 2] = float("nan")
    each = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=3),
        SamplingParams(temperature=0.0, logprobs=1),
        SamplingParams(temperature=0.0, logit_bias=((1, 99.0),)),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0),
        SamplingParams(seed=4, top_k=2),
    ]
    rows = [SamplingRow(params, 0, i) for i, params in enumerate(each)]
    alone = [sample(logits[i : i + 1], [row])[0] for i, row in enumerate(rows)]
    assert sample(logits, rows) == alone
    assert sample(logits, rows, score=logprob_entries_by_row) == alone
    best = logits.argmax(-1).tolist()
    assert [alone[i].token for i in (0, 2, 3, 4, 5)] == [best[0], best[2], 1, best[4], -1]


def test_rows_alone_are_drawn_and_scored_from_their_own_logits() -> None:
    logits = torch.eye(VOCAB)[[3, 7, 5]] * 50.0
    drawn = sample(logits, rows_of(SamplingParams(seed=1), 3), score=logprob_entries_by_row)
    assert [d.token for d in drawn] == [3, 7, 5]
    alone = logprob_entries_by_row(logits, [3, 7, 0], [2, 1, 0])
    assert alone == logprob_entries(logits, [3, 7, 0], [2, 1, 0])
    assert [entry.rank for entry in alone] == [1, 1, 2]
