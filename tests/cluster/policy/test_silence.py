"""How long a worker may be silent, by the gaps between its signs of life."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.policy.silence import LATENESS_FACTOR, MIN_GAPS, REMOTE_MIN_S, WINDOW_S, GapWindow

EXPECTED_S = 0.1
gap = st.floats(0.0, 5.0)
BUSY_MS = """
37 4 87 36 15 3 61 29 64 31 26 0 74 27 158 27 67 23 33 26 73 76 82 32 83 107 70 6 93 103 44 29
28 64 2 206 32 16 70 40 30 8 33 66 2 27 40 15 33 10 10 94 9 21 31 15 7 48 7 44 3 99 0 21 79 73 4
30 11 26 24 34 20 92 16 32 50 48 67 120 26 63 5 38 23 105 77 36 10 162 167 36 36 82 21 15 255 34
36 135 2 19 16 15 27 4 13 42 43 7 50 48 4 22 39 33 4 50 13 11 34 42 18 54 8 11 33 27 77 12 22 6
16 3 9 8 14 59 41 9 2 6 19 2 7 18 12 12 30 12 12 7 4 1 1 7 8 120 18 2 6 65 83 9 7 167 14 0 0 15
19 13 408 64 33 12 75 0 26 34 21 6 39 10 10 1 16 16 102 1 28 125 18 20 6 7 36 65 35 13 144 44 19
11 24 29 10 9 18 0 23 13 29 14 6 4 35 40 30 23 18 20 1 10 14 5 0 23 11 15 0 11 47 42 16 16 29 23
49 5 7 9 9 32 5 55 3 2 3 10 51 2 16 5 10 6 5 7 14 12 37 3 2 53 1 10 56 2 12 19 23 29 14 47 37 2
6 13 22 19 18 10 13 19 9 10 66 31 35 29 45 44 43 2 44 13 1 96 67 53 7
"""
"""How late a thread was that sleeps for 0.1 s, in ms: 40 s at the lowest priority on two cores with
a load of ten, beside two threads that never gave up Python's lock by themselves
and one that multiplied matrices."""


def window_of(*gaps: float, expected_s: float = EXPECTED_S) -> GapWindow:
    """A window that knows these gaps and no others."""
    window = GapWindow(expected_s)
    for now in (0.0, WINDOW_S):
        window.add(0.0, now)
    for each in gaps:
        window.add(each, WINDOW_S)
    return window


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        (0.1, 0.4),  # four expected gaps
        (0.05, 0.4),  # early is not late
        (0.15, 0.4),
        (0.2, 0.5),  # 0.1 and four times 0.1
        (0.4, 1.3),
        (math.inf, math.inf),  # nothing is known
    ],
)
def test_patience_follows_the_largest_gap(largest: float, expected: float) -> None:
    assert window_of(largest).patience_s == pytest.approx(expected)


@pytest.mark.parametrize(("largest", "expected"), [(0.1, REMOTE_MIN_S), (0.4, 1.3)])
def test_a_segment_may_be_lost_twice_on_its_way_from_another_host(
    largest: float, expected: float
) -> None:
    window = GapWindow(EXPECTED_S, is_remote=True)
    for now in (0.0, WINDOW_S):
        window.add(largest, now)
    assert window.patience_s == pytest.approx(expected)


def test_nothing_is_known_before_a_window_has_passed() -> None:
    window, known_at = GapWindow(), []
    for tenths in range(200):
        window.add(0.2, tenths / 10)
        if window.patience_s < math.inf:
            known_at.append(tenths / 10)
    assert known_at[0] == WINDOW_S
    assert window.patience_s == pytest.approx(0.5)


@pytest.mark.parametrize("large", [0.4, math.inf])
@pytest.mark.parametrize("began_at", [0.0, 7.0, WINDOW_S - 0.1])
def test_a_large_gap_counts_for_a_window_and_at_most_for_two(began_at: float, large: float) -> None:
    began_at += WINDOW_S
    window = window_of()  # it rotates at multiples of ``WINDOW_S``
    window.add(large, began_at)
    seen = []
    for tenths in range(1, 10 * 2 * round(WINDOW_S) + 2):
        window.add(0.1, began_at + tenths / 10)
        if window.patience_s > 1.0:
            seen.append(tenths / 10)
    assert seen == sorted(seen)
    assert WINDOW_S <= seen[-1] <= 2 * WINDOW_S


def test_a_gap_is_forgotten_with_the_window_after_its_own() -> None:
    window = window_of(0.4)
    window.add(0.1, 2 * WINDOW_S)
    assert window.patience_s == pytest.approx(1.3)
    window.add(0.1, 3 * WINDOW_S - 0.125)
    assert window.patience_s == pytest.approx(1.3)
    window.add(0.1, 3 * WINDOW_S)
    assert window.patience_s == pytest.approx(0.4)


@given(st.lists(gap), st.floats(0.01, 1.0))
def test_patience_is_never_below_four_gaps(gaps: list[float], expected_s: float) -> None:
    assert window_of(*gaps, expected_s=expected_s).patience_s >= MIN_GAPS * expected_s


@given(st.lists(gap, min_size=1), st.floats(0.0, LATENESS_FACTOR))
def test_no_alarm_while_lateness_stays_within_the_factor_of_the_largest(
    gaps: list[float], times: float
) -> None:
    late_s = max(0.0, max(gaps) - EXPECTED_S)
    next_gap = EXPECTED_S + times * late_s
    assert next_gap <= window_of(*gaps).patience_s + 1e-9


@given(st.lists(st.tuples(gap, st.floats(0.0, WINDOW_S)), min_size=1))
def test_no_gap_is_forgotten_within_a_window(steps: list[tuple[float, float]]) -> None:
    window, now, seen = window_of(), WINDOW_S, []
    for gap_s, passed_s in steps:
        now += passed_s
        window.add(gap_s, now)
        seen.append((gap_s, now))
    largest = max(g for g, at in seen if now - at < WINDOW_S)
    assert window.patience_s >= window_of(largest).patience_s


def test_a_busy_machine_raises_no_alarm_once_its_gaps_are_known() -> None:
    window, now, patience = GapWindow(), 0.0, []
    for late_ms in map(int, BUSY_MS.split()):
        gap_s = EXPECTED_S + late_ms / 1000
        now += gap_s
        patience.append(window.patience_s)
        assert gap_s <= patience[-1]
        window.add(gap_s, now)
    assert patience[80] == math.inf
    assert min(patience) == pytest.approx(0.1 + 4 * 0.255)
