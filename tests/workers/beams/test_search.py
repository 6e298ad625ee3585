"""Beam search in plain values: against all outputs there are, and against whole-matrix steps."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from workers.beams.search import BeamSearch
from workers.requests.request import BeamParams, EarlyStopping, TokenLogprob

pytestmark = pytest.mark.heavy

Tokens = tuple[int, ...]
Model = Callable[[Tokens], Sequence[float]]
"""Log-probabilities of all tokens behind an output."""
Found = list[tuple[Tokens, float]]
STOPS = {EarlyStopping.HEURISTIC: False, EarlyStopping.FULL: True, EarlyStopping.NEVER: "never"}


def random_model(vocab_size: int, seed: int, scale: float = 2.0) -> Model:
    """Other log-probabilities behind every output, the same each time."""

    def logprobs(output: Tokens) -> Sequence[float]:
        rng = random.Random(f"{seed} {output}")
        logits = np.array([rng.gauss(0, scale) for _ in range(vocab_size)])
        values: list[float] = (logits - np.log(np.exp(logits).sum())).tolist()
        return values

    return logprobs


def candidates(
    values: Sequence[float], width: int, ending: frozenset[int], may_end: bool = True
) -> list[TokenLogprob]:
    """What the sampler makes of a row, in any order."""
    ranked = sorted(range(len(values)), key=lambda token: -values[token])
    best = ranked[:width] if may_end else []
    others = [token for token in ranked if token not in ending][:width]
    return [TokenLogprob(token_id=t, logprob=values[t]) for t in {*best, *others}]


def run(
    model: Model,
    params: BeamParams,
    width: int,
    max_tokens: int,
    ending: frozenset[int],
    min_tokens: int = 0,
) -> Found:
    """All steps of a search."""
    search = BeamSearch(params, width=width, max_tokens=max_tokens, ending=ending)
    outputs: list[Tokens] = [()]
    while not search.is_over:
        assert search.num_running == len(outputs)
        may_end = len(outputs[0]) >= min_tokens
        rows = [candidates(model(output), width, ending, may_end) for output in outputs]
        outputs = [(*outputs[one.parent], one.token) for one in search.advance(rows)]
    found = [(tuple(t.token_id for t in one.path.tokens()), one.score) for one in search.ended]
    assert [score for _, score in found] == sorted((s for _, s in found), reverse=True)
    return found


def all_outputs(
    model: Model, max_tokens: int, ending: frozenset[int], length_penalty: float
) -> Found:
    """Every output that ends, by score."""
    found: Found = []

    def visit(output: Tokens, total: float) -> None:
        if output and (output[-1] in ending or len(output) == max_tokens):
            found.append((output, total / len(output) ** length_penalty))
            return
        for token, value in enumerate(model(output)):
            visit((*output, token), total + value)

    visit((), 0.0)
    return sorted(found, key=lambda one: -one[1])


def whole_matrix(
    model: Model, params: BeamParams, width: int, max_tokens: int, ending: frozenset[int]
) -> Found:
    """The steps as transformers writes them: masks of -1e9 over all continuations of all beams."""
    penalty, mask = params.length_penalty, -1e9
    outputs: list[Tokens] = [()] * width
    totals: NDArray[np.float64] = np.array([0.0] + [mask] * (width - 1))
    ended: list[tuple[float, Tokens, bool]] = [(mask, (), False)] * width
    for length in itertools.count(1):
        values = np.stack([model(output) for output in outputs]) + totals[:, None]
        vocab_size = values.shape[1]
        order = np.argsort(-values.reshape(-1), kind="stable")
        order = order[: max(2, 1 + len(ending)) * width]
        paths = [(*outputs[i // vocab_size], int(i % vocab_size)) for i in order]
        scores = values.reshape(-1)[order]
        stops = np.array([path[-1] in ending or length == max_tokens for path in paths])
        best = np.argsort(-(scores + stops * mask), kind="stable")[:width]
        outputs, totals = [paths[i] for i in best], (scores + stops * mask)[best]
        news = [
            (scores[i] / length**penalty, paths[i], True)
            if stops[i] and i < width
            else (mask, paths[i], False)
            for i in range(len(paths))
        ]
        ended = sorted([*ended, *news], key=lambda one: -one[0])[:width]
        is_full = all(one[2] for one in ended)
        grows = params.early_stopping is EarlyStopping.NEVER and penalty > 0
        possible = totals[0] / (max_tokens if grows else length) ** penalty
        improves = not is_full or possible > min(one[0] for one in ended)
        stops_full = is_full and params.early_stopping is EarlyStopping.FULL
        if not improves or stops_full or stops.all():
            break
    return [(path, score) for score, path, _ in ended]


def same(got: Found, want: Found) -> None:
    assert [tokens for tokens, _ in got] == [tokens for tokens, _ in want]
    assert [s for _, s in got] == pytest.approx([s for _, s in want], abs=1e-9)


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(5))
def test_beams_enough_for_all_prefixes_find_the_best_of_all_outputs(
    length_penalty: float, seed: int
) -> None:
    model, ending = random_model(4, seed), frozenset({1})
    everything = all_outputs(model, 4, ending, length_penalty)
    params = BeamParams(length_penalty=length_penalty)
    same(run(model, params, len(everything), 4, ending), everything)


@pytest.mark.parametrize("stops", EarlyStopping)
@pytest.mark.parametrize("length_penalty", [-0.5, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("width", [2, 3, 5])
@pytest.mark.parametrize("ending", [(), (3,), (1, 4, 6)])
def test_steps_are_those_of_transformers(
    stops: EarlyStopping, length_penalty: float, width: int, ending: Tokens
) -> None:
    params = BeamParams(length_penalty=length_penalty, early_stopping=stops)
    for seed in range(4):
        model = random_model(10, seed)
        args = model, params, width, 7, frozenset(ending)
        same(run(*args), whole_matrix(*args))


@pytest.mark.parametrize("stops", EarlyStopping)
def test_one_beam_takes_the_best_tokens_up_to_the_first_end(stops: EarlyStopping) -> None:
    for seed in range(20):
        model, output = random_model(6, seed), list[int]()
        while len(output) < 5 and 2 not in output:
            output.append(int(np.argmax(model(tuple(output)))))
        params = BeamParams(early_stopping=stops)
        ((got, _),) = run(model, params, 1, 5, frozenset({2}))
        assert got == tuple(output)


def test_the_example_of_the_module() -> None:
    search = BeamSearch(BeamParams(), width=2, max_tokens=9, ending=frozenset({2}))
    first = [[(8, -1.0), (9, -1.2)]]
    second = [[(7, -0.1), (2, -0.4)], [(5, -0.1), (2, -3.0)]]
    for step in (first, second):
        rows = [[TokenLogprob(token_id=t, logprob=v) for t, v in row] for row in step]
        beams = search.advance(rows)
    assert [(one.parent, one.token) for one in beams] == [(0, 7), (1, 5)]
    assert not search.ended


def test_ties_go_to_the_better_beam_and_the_lower_token() -> None:
    search = BeamSearch(BeamParams(), width=3, max_tokens=9, ending=frozenset())
    even = [TokenLogprob(token_id=t, logprob=math.log(0.25)) for t in (3, 2, 1, 0)]
    assert [one.token for one in search.advance([even])] == [0, 1, 2]
    found = search.advance([even] * 3)
    assert [(one.parent, one.token) for one in found] == [(0, 0), (0, 1), (0, 2)]


def test_outputs_shorter_than_min_tokens_do_not_end() -> None:
    ending, lengths = frozenset({0, 1}), set[int]()
    for seed in range(8):
        found = run(random_model(5, seed), BeamParams(), 3, 6, ending, min_tokens=3)
        lengths.update(len(tokens) for tokens, _ in found)
    assert lengths == {4, 5, 6}


def test_a_long_output_is_freed_without_recursion() -> None:
    search = BeamSearch(BeamParams(), width=1, max_tokens=200_000, ending=frozenset())
    row = [[TokenLogprob(token_id=5, logprob=-0.5)]]
    while not search.is_over:
        search.advance(row)
    (only,) = search.ended
    assert len(only.path.tokens()) == 200_000
    del only, search
