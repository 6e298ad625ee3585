"""What keeping a prefix is worth, from what was seen of others of its kind and age."""

from __future__ import annotations

import math

import pytest

from workers.kv.reuse_rates import (
    FIRST_BIN,
    NEW_RATE,
    NUM_BINS,
    ReuseRates,
    bin_end,
    bin_of,
)

NEW = ReuseRates.kind(0, has_session=False)
USED = ReuseRates.kind(1, has_session=False)


def value(rates: ReuseRates, kind: int, age: int) -> float:
    return rates.value(kind, bin_of(age), age)


def observe(rates: ReuseRates, kind: int, num_turns: int, reused: dict[int, float]) -> None:
    """Turns that reach all bins; the part that is used again there, by bin."""
    for number in range(num_turns):
        for place in range(6):
            rates.note_reached(kind, place)
            if number % 100 < 100 * reused.get(place, 0.0):
                rates.note_reused(kind, place)


def test_bins_cover_all_ages_without_gaps() -> None:
    begin = 0
    for place in range(NUM_BINS - 1):
        assert bin_of(begin) == place
        begin = bin_end(place)
        assert bin_of(begin - 1) == place
    assert bin_of(begin) == bin_of(begin * 1000) == NUM_BINS - 1
    assert bin_end(0) == FIRST_BIN


def test_kinds_are_numbered_by_turns_before_and_by_session() -> None:
    depths = [ReuseRates.kind(n, has_session=False) for n in (0, 1, 2, 3, 4, 7, 8, 1000)]
    assert depths == [0, 1, 2, 2, 3, 3, 4, 4]
    with_session = [ReuseRates.kind(n, has_session=True) for n in (0, 1, 2, 4, 8)]
    assert with_session == [5, 6, 7, 8, 9]


def test_at_first_only_age_counts_and_half_of_it_for_what_was_used() -> None:
    rates = ReuseRates()
    for age in (1, 50, 64, 1000, 10**6):
        assert value(rates, USED, 2 * age) == pytest.approx(value(rates, NEW, age), rel=0.01)
        assert value(rates, NEW, age) > value(rates, NEW, age + 1)
    assert value(rates, NEW, 0) == math.inf
    plain = ReuseRates(used_rate=NEW_RATE)
    assert value(plain, USED, 100) == value(plain, NEW, 100)


def test_a_kind_that_is_rarely_used_again_is_worth_less() -> None:
    rates = ReuseRates()
    observe(rates, NEW, 400, {0: 0.01})
    observe(rates, USED, 400, {0: 0.8})
    assert value(rates, NEW, 10) < 0.1 * value(rates, USED, 50)


def test_what_is_used_again_late_is_worth_keeping_until_then() -> None:
    rates = ReuseRates()
    observe(rates, NEW, 400, {3: 0.9})  # nothing before an age of 256 blocks, then most
    at_first, in_time, after = (value(rates, NEW, age) * age for age in (10, 300, 600))
    assert in_time > 4 * after
    assert value(rates, NEW, 200) > value(rates, NEW, 600)
    assert at_first < in_time, "beside its age: the time until then must be paid for"


def test_rates_follow_a_change() -> None:
    rates = ReuseRates()
    observe(rates, NEW, 5000, {0: 0.9})
    before = value(rates, NEW, 10)
    observe(rates, NEW, 20_000, {0: 0.01})
    assert value(rates, NEW, 10) < 0.1 * before
