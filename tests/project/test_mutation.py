"""The trial of mutants counts only changes that some test could notice."""

from __future__ import annotations

import ast

import pytest

from tests.mutation import EQUIVALENT, TESTS, mutants_of, places
from tests.paths import ROOT


@pytest.mark.parametrize("path", EQUIVALENT)
def test_what_makes_no_difference_is_still_in_its_module(path: str) -> None:
    text = (ROOT / path).read_text()
    for part in EQUIVALENT[path]:
        assert text.count(part) == 1, f"{path} must contain once: {part}"
    num_places = len(places(ast.parse(text)))
    assert len(EQUIVALENT[path]) <= num_places - len(mutants_of(path)) < num_places / 5


def test_few_changes_make_no_difference() -> None:
    assert EQUIVALENT.keys() <= TESTS.keys()
    assert sum(map(len, EQUIVALENT.values())) <= 25
