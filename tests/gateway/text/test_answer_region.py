"""Stops count in the answer, not in the reasoning, however the text is cut into pieces."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gateway.core.thinking import Thinking
from gateway.text.answer_region import AnswerRegion
from gateway.text.detokenizer import ChoiceText, StopStringFinder, make_detokenizer
from tests.gateway.fakes import tiny_tokenizer

OPENED = "<|start|>assistant<|channel|>final<|message|>"
CASES = (
    (lambda: AnswerRegion.after_thinking(Thinking.OPEN), "a b</think>\n\n", "c b"),
    (lambda: AnswerRegion.after_thinking(Thinking.POSSIBLE), "<think>a b</think>\n", "c b"),
    (lambda: AnswerRegion.after_thinking(Thinking.POSSIBLE), " \n<think>a</think>", "c b"),
    (lambda: AnswerRegion.after_thinking(Thinking.POSSIBLE), "", "<thin a</think> b"),
    (lambda: AnswerRegion.after_thinking(Thinking.POSSIBLE), "", " c b"),
    (lambda: AnswerRegion.after_thinking(Thinking.POSSIBLE), "", "<th"),
    (lambda: AnswerRegion.after_thinking(Thinking.OPEN), "a </thin </think", ""),
    (
        lambda: AnswerRegion.for_harmony("<|start|>assistant"),
        "<|channel|>analysis<|message|>a final b<|end|><|start|>assistant<|channel|>final "
        "<|constrain|>json<|message|>",
        "{}",
    ),
    (lambda: AnswerRegion.for_harmony(OPENED), "", "c b"),
    (
        lambda: AnswerRegion.for_harmony("<|start|>assistant"),
        "<|channel|>?? final??<|message|>",
        "b",
    ),
    (
        lambda: AnswerRegion.for_harmony("<|start|>assistant<|channel|>analysis<|message|>"),
        "a<|end|><|start|>assistant<|channel|>final<|message|>",
        "\nb",
    ),
)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize(("make", "before", "answer"), CASES)
def test_a_text_is_divided_alike_however_it_is_cut(
    make: Callable[[], AnswerRegion], before: str, answer: str, size: int
) -> None:
    region, found = make(), ["", ""]
    text = before + answer
    for start in range(0, len(text), size):
        for piece, is_answer in region.split(text[start : start + size]):
            found[is_answer] += piece
    found[1] += region.flush()
    assert found == [before, answer]


def feed(
    text: str, stops: list[str], stop_ids: list[int], min_tokens: int = 0
) -> tuple[str, object]:
    tokenizer = tiny_tokenizer()
    region = AnswerRegion.after_thinking(Thinking.OPEN)
    choice = ChoiceText(
        make_detokenizer(tokenizer), StopStringFinder(stops), min_tokens, region, stop_ids
    )
    found = ""
    for token in tokenizer.encode(text, add_special_tokens=False):
        stopped = choice.feed(token, None)
        found += choice.take()[0]
        if stopped is not None:
            return found + choice.take(always=True)[0], stopped
    choice.finish()
    return found + choice.take(always=True)[0], None


def test_stop_strings_in_the_reasoning_are_text() -> None:
    text = "stop here\n\n</think>\n\ngo on, stop now"
    assert feed(text, ["stop"], []) == ("stop here\n\n</think>\n\ngo on, ", "stop")
    assert feed(text, ["\n\n"], []) == (text, None)


def test_stop_tokens_in_the_reasoning_are_text() -> None:
    (token,) = tiny_tokenizer().encode("x", add_special_tokens=False)
    assert feed("axb</think>\ncxd", [], [token]) == ("axb</think>\nc", token)
    assert feed("axb</think>\ncxd", [], [token], min_tokens=100) == ("axb</think>\ncxd", None)


PARTS = (
    ("<|channel|>analysis<|message|>a stop<|end|><|start|>assistant", 0),
    ("<|channel|>commentary<|message|>", 0),
    ("I look. st<|end|>", 1),
    ("<|start|>assistant<|channel|>analysis<|message|>b stop", 0),
    ("<|end|><|start|>assistant<|channel|>final<|message|>", 0),
    ("c ", 1),
)
"""Of an answer in the Harmony format with words before more reasoning; 1: of the answer."""


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_reasoning_may_be_between_parts_of_an_answer(size: int) -> None:
    region, found = AnswerRegion.for_harmony("<|start|>assistant"), ""
    whole = "".join(text for text, _ in PARTS)
    for start in range(0, len(whole), size):
        for piece, is_answer in region.split(whole[start : start + size]):
            found += piece.upper() if is_answer else piece
    assert found == "".join(text.upper() if place else text for text, place in PARTS)


def test_stops_do_not_count_in_reasoning_between_parts_of_an_answer() -> None:
    tokenizer, whole = tiny_tokenizer(), "".join(text for text, _ in PARTS)
    region = AnswerRegion.for_harmony("<|start|>assistant")
    choice = ChoiceText(make_detokenizer(tokenizer), StopStringFinder(["stop"]), 0, region)
    stopped = [choice.feed(token, None) for token in tokenizer.encode(f"{whole}stop", False)]
    assert (choice.take(always=True)[0], stopped[-1]) == (whole, "stop")
    assert set(stopped[:-1]) == {None}
