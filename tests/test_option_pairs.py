"""Options do not change answers, in any pair of their values; the full matrix is a benchmark."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.option_matrix import OPTIONS, Choice, all_choices, check, describe, pairs_of, pairwise

PICKED = pairwise(list(all_choices()))


@pytest.mark.parametrize("choice", PICKED, ids=map(describe, PICKED))
def test_a_pair_of_options_changes_no_answer(tiny_checkpoint: Path, choice: Choice) -> None:
    check(choice, tiny_checkpoint)


def test_every_possible_pair_is_picked() -> None:
    possible = set().union(*map(pairs_of, all_choices()))
    assert set().union(*map(pairs_of, PICKED)) == possible
    assert (("num_micro_batches", 2), ("deterministic", True)) in possible
    assert {value for pair in possible for value in pair} == {
        (name, value) for name, values in OPTIONS.items() for value in values
    }


def test_few_combinations_are_enough() -> None:
    num_pairs = max(len(a) * len(b) for a in OPTIONS.values() for b in OPTIONS.values() if a != b)
    assert num_pairs <= len(PICKED) <= 20
    assert len({describe(choice) for choice in PICKED}) == len(PICKED)
