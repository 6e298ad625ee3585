"""How often guesses were right of late, and how many rows of guesses that is worth."""

from __future__ import annotations

import pytest

from workers.speculation.acceptance import Acceptance, num_accepted


def test_worth_is_the_number_of_guesses_with_a_chance_above_the_price() -> None:
    acceptance = Acceptance()
    assert acceptance.share == 0.5
    assert acceptance.num_worthwhile(0.3, 8) == 1
    assert acceptance.num_worthwhile(0.2, 8) == 2
    assert acceptance.num_worthwhile(0.6, 8) == 0


def test_right_guesses_raise_the_number_and_wrong_ones_end_it() -> None:
    acceptance = Acceptance()
    counts = []
    for _ in range(6):
        acceptance.note(2, 0)
        counts.append(acceptance.num_worthwhile(0.3, 8))
    assert counts == sorted(counts)
    assert counts[-1] == 8
    for _ in range(30):
        acceptance.note(0, 1)
    assert acceptance.num_worthwhile(0.3, 8) == 0
    for _ in range(20):
        acceptance.note(1, 0)
    assert acceptance.num_worthwhile(0.3, 8) > 1


def test_share_stays_between_its_bounds() -> None:
    acceptance = Acceptance()
    for right, wrong in [(1000, 0), (0, 1000), (8, 1)] * 20:
        acceptance.note(right, wrong)
        assert 0 < acceptance.share < 1


def test_each_guess_makes_earlier_ones_weigh_a_twentieth_less() -> None:
    acceptance = Acceptance()
    acceptance.note(2, 1)
    kept = 0.95**3
    assert acceptance.share == pytest.approx((kept + 2) / (2 * kept + 3))


def test_a_guess_must_be_worth_more_than_its_row() -> None:
    assert Acceptance().num_worthwhile(0.5, 8) == 0
    assert Acceptance().num_worthwhile(0.02, 2) == 2


@pytest.mark.parametrize(
    ("drawn", "is_finite", "expected"),
    [
        ([5, 6, 9, 4], [True] * 4, 2),
        ([5, 6, 7, 4], [True] * 4, 3),
        ([4, 6, 7, 4], [True] * 4, 0),
        ([5, 6, 7, -2], [True] * 4, 2),
        ([5, 6, 7, 4], [True, True, False, True], 1),
    ],
)
def test_drafts_are_accepted_up_to_the_first_that_is_not_drawn_or_has_no_token(
    drawn: list[int], is_finite: list[bool], expected: int
) -> None:
    assert num_accepted((5, 6, 7), drawn, is_finite) == expected
