"""The price of a row in tokens, from the times of steps."""

from __future__ import annotations

import random

import pytest

from workers.speculation.step_cost import DecodeStepCost, StepCosts


def observed(begin_s: float, row_s: float, sizes: list[int]) -> DecodeStepCost:
    cost = DecodeStepCost()
    for size in sizes:
        cost.observe(size, begin_s + row_s * size)
    return cost


def test_row_is_cheap_where_steps_read_weights_and_dear_where_rows_take_the_time() -> None:
    sizes = [1, 5, 9] * 20
    assert observed(10.0, 0.5, sizes).price(1) == pytest.approx(0.5 / 10.5, abs=0.01)
    assert observed(0.1, 1.0, sizes).price(1) == pytest.approx(1 / 1.1, abs=0.1)


def test_price_grows_with_the_number_of_sequences() -> None:
    cost = observed(8.0, 1.0, [1, 4, 9, 16, 24] * 20)
    prices = [cost.price(count) for count in (1, 4, 16, 64)]
    assert prices == sorted(prices)
    assert prices[0] < 0.15
    assert prices[-1] > 0.8


def test_a_try_is_made_until_steps_of_different_sizes_are_known() -> None:
    assert DecodeStepCost().price(8) == 0.3
    assert observed(5.0, 1.0, [8] * 100).price(8) == pytest.approx(0.3)


def test_steps_that_did_not_pay_are_forgotten() -> None:
    cost = observed(0.0, 1.0, [4, 12] * 20)
    assert cost.price(4) > 0.9
    for _ in range(300):
        cost.observe(4, 4.0)
    assert cost.price(4) < 0.5


def test_one_slow_step_does_not_change_the_price_much() -> None:
    cost = observed(10.0, 0.5, [1, 5, 9] * 20)
    cost.observe(9, 1000.0)
    assert cost.price(1) < 0.1


def test_price_stays_within_its_bounds_whatever_steps_take() -> None:
    rng, cost = random.Random(0), DecodeStepCost()
    for _ in range(2000):
        cost.observe(rng.randrange(1, 80), rng.choice((0.0, rng.random(), 100 * rng.random())))
        assert 0.02 <= cost.price(rng.randrange(1, 80)) <= 1


def test_a_slow_step_counts_as_one_of_half_as_long_again_as_expected() -> None:
    cost = DecodeStepCost()
    cost.observe(1, 1.0)  # assumed: 0.7 s, and 0.3 s for each row
    cost.observe(5, 100.0)  # expected: 2.2 s
    assert cost.price(1) == pytest.approx(0.2884, abs=1e-4)


def test_batches_of_about_the_same_size_share_a_line() -> None:
    costs = StepCosts()
    groups = [(0, 1), (2,), (3, 4), (5, 6, 7, 8), (9, 16), (17, 32)]
    lines = [{costs.of(count) for count in group} for group in groups]
    assert [len(found) for found in lines] == [1] * len(groups)
    assert len(set().union(*lines)) == len(groups)
