"""Options do not change answers, in any pair of their values; the full matrix is a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.harness.option_matrix import (
    OPTIONS,
    Choice,
    all_choices,
    check,
    check_near,
    describe,
    pairs_of,
    pairwise,
)
from workers.requests.request import Request, SamplingParams, TokenLogprob, TokenOutput

pytestmark = pytest.mark.heavy

PICKED = pairwise(list(all_choices()))


@pytest.mark.parametrize("choice", PICKED, ids=map(describe, PICKED))
def test_a_pair_of_options_changes_no_answer(tiny_checkpoint: Path, choice: Choice) -> None:
    check(choice, tiny_checkpoint)


def test_every_possible_pair_is_picked() -> None:
    possible = set().union(*map(pairs_of, all_choices()))
    assert set().union(*map(pairs_of, PICKED)) == possible
    assert (("num_micro_batches", 2), ("deterministic", "on")) in possible
    assert {value for pair in possible for value in pair} == {
        (name, value) for name, values in OPTIONS.items() for value in values
    }


def test_few_combinations_are_enough() -> None:
    num_pairs = max(len(a) * len(b) for a in OPTIONS.values() for b in OPTIONS.values() if a != b)
    assert num_pairs <= len(PICKED) <= 20
    assert len({describe(choice) for choice in PICKED}) == len(PICKED)


def answer(*drawn: tuple[int, Sequence[float]]) -> list[TokenOutput]:
    """An output for each (token, logprobs of the whole vocabulary)."""
    return [
        TokenOutput(
            request_id="r",
            attempt=0,
            choice=0,
            index=index,
            token_ids=(token,),
            logprobs=(
                TokenLogprob(
                    token_id=token,
                    logprob=logprobs[token],
                    rank=1,
                    top_ids=tuple(sorted(range(len(logprobs)), key=lambda one: -logprobs[one])),
                    top_logprobs=tuple(sorted(logprobs, reverse=True)),
                ),
            ),
        )
        for index, (token, logprobs) in enumerate(drawn)
    ]


PLAIN = (-0.7, -1.0, -3.0)
TIED = (-0.85, -0.84, -3.0)
KNOWN = answer((0, PLAIN), (0, PLAIN))
GREEDY = Request(request_id="r", prompt=(1,), params=SamplingParams(temperature=0.0))
DRAWN = replace(GREEDY, params=SamplingParams(temperature=1.0, seed=1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("request_", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_a_wrong_answer_is_seen(request_: Request, dtype: str) -> None:
    check_near(request_, KNOWN, KNOWN, dtype)
    wrong = answer((0, PLAIN), (0, (-1.0, -0.7, -3.0)))
    with pytest.raises(AssertionError, match="r, token 1"):
        check_near(request_, wrong, KNOWN, dtype)
    with pytest.raises(AssertionError, match="r, token 1"):
        check_near(request_, answer((0, PLAIN), (2, (-0.7, -1.0, -2.7))), KNOWN, dtype)
    with pytest.raises(AssertionError, match=r"^r"):
        check_near(request_, answer((0, PLAIN)), KNOWN, dtype)


def test_only_a_near_tie_may_change_a_token() -> None:
    other = answer((1, TIED), (2, TIED))
    check_near(GREEDY, other, KNOWN, "bfloat16")
    check_near(DRAWN, other, KNOWN, "bfloat16")
    far = answer((2, PLAIN), (2, TIED))
    check_near(DRAWN, far, KNOWN, "bfloat16")
    for request, dtype in ((GREEDY, "bfloat16"), (DRAWN, "float32")):
        with pytest.raises(AssertionError, match="r, token 0"):
            check_near(request, far, KNOWN, dtype)
