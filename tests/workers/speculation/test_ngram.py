"""Guesses by n-grams: from the best earlier place, without a search of the text."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from workers.speculation.ngram import NgramIndex


def index_of(tokens: Sequence[int], least: int = 2, most: int = 5) -> NgramIndex:
    index = NgramIndex(least, most)
    index.extend(tokens)
    return index


def searched(tokens: Sequence[int], count: int, least: int, most: int) -> tuple[int, ...]:
    """The guess, by looking at every place: the latest of those where most tokens agree."""
    best = longest = 0
    for place in range(len(tokens) - 1, 0, -1):
        agreeing = 0
        while agreeing < min(most, place) and tokens[place - 1 - agreeing] == tokens[-1 - agreeing]:
            agreeing += 1
        if agreeing >= least and agreeing > longest:
            best, longest = place, agreeing
    if not best:
        return ()
    found = list(tokens[best:])
    return tuple(found[i % len(found)] for i in range(count))


def test_text_goes_on_as_before() -> None:
    assert index_of([5, 6, 7, 8, 9, 5, 6]).guess(3) == (7, 8, 9)
    assert index_of([5, 6, 7, 8, 9, 5, 6]).guess(1) == (7,)


def test_nothing_is_guessed_where_nothing_repeats() -> None:
    assert index_of([]).guess(4) == ()
    assert index_of([5]).guess(4) == ()
    assert index_of([5, 6, 7, 8, 6]).guess(4) == ()  # a single token is not enough
    assert index_of([5, 6, 7, 5, 6]).guess(0) == ()


def test_place_where_more_tokens_agree_wins_over_a_later_one() -> None:
    text = [1, 2, 3, 40, 9, 2, 3, 50, 1, 2, 3]
    assert index_of(text).guess(1) == (40,)
    assert index_of(text, least=1).guess(1) == (40,)
    assert index_of(text, least=2, most=2).guess(1) == (50,)


def test_loop_is_guessed_beyond_its_own_end() -> None:
    assert index_of([4, 4, 4]).guess(6) == (4, 4, 4, 4, 4, 4)
    assert index_of([1, 2, 3, 1, 2, 3, 1, 2]).guess(7) == (3, 1, 2, 3, 1, 2, 3)


@pytest.mark.parametrize(("least", "most"), [(1, 1), (1, 4), (2, 5), (3, 3)])
def test_growing_index_guesses_like_a_search_of_all_places(least: int, most: int) -> None:
    """Of texts in which no n-gram has more earlier places than are compared."""
    rng = random.Random(least + most)
    for _ in range(60):
        tokens = [rng.randrange(6) for _ in range(rng.randrange(1, 16))]
        index = NgramIndex(least, most)
        done = 0
        while done < len(tokens):
            step = rng.randrange(1, 5)
            index.extend(tokens[done : done + step])
            done = min(done + step, len(tokens))
            assert len(index) == done
            assert index.guess(4) == searched(tokens[:done], 4, least, most)


def test_token_ids_of_any_size_are_kept_apart() -> None:
    big = (1 << 31) - 1
    assert index_of([0, big, 7, 1, big, 8, 0, big]).guess(1) == (7,)
