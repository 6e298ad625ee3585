"""Answers in the Harmony format: what of them is reasoning, words for the user, and calls."""

from __future__ import annotations

import itertools
import random
import re
from typing import Any

import pytest

from gateway.text.harmony.parser import MAX_HEADER_CHARS, HarmonyParser
from gateway.text.harmony.special_tokens import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    MESSAGE,
    OPENED,
    RETURN,
    SPECIAL_TOKENS,
    START,
)
from gateway.text.tool_formats.tool_calls import ParsedPiece
from tests.gateway.text.harmony.examples import (
    PLAN,
    PLAN_ARGUMENTS,
    SUM,
    WEATHER,
    WEATHER_ARGUMENTS,
    WORDS_BEFORE_CALL,
)

pytestmark = pytest.mark.heavy

ROLE_FIRST = (
    "<|channel|>analysis<|message|>Run it.<|end|><|start|>assistant to=functions.python<|channel|>"
    'commentary<|message|>{"code": "1 < 2"}<|call|>'
)
FIND = (
    "<|channel|>analysis<|message|>Let me look.<|end|><|start|>assistant to=browser.search"
    '<|channel|>analysis<|message|>{"q":1}'
)
NAMES = ("get_weather", "generate_file", "python", "f")
Call = tuple[str, str]


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        (SUM, 'User asks: "What is 2 + 2?" Simple arithmetic. Provide answer.', "2 + 2 = 4.", []),
        (WEATHER, "Need to use function get_weather.", "", [("get_weather", WEATHER_ARGUMENTS)]),
        (
            PLAN,
            "{long chain of thought}",
            WORDS_BEFORE_CALL,
            [("generate_file", PLAN_ARGUMENTS)],
        ),
        (ROLE_FIRST, "Run it.", "", [("python", '{"code": "1 < 2"}')]),
        (FIND, 'Let me look.{"q":1}', "", []),
        (
            "... Let's use the tool.<|end|><|start|>assistant to=functions.get_weather<|channel|>"
            'commentary json<|message|>{"location": "Tokyo"}<|call|>',
            "",
            "... Let's use the tool.",
            [("get_weather", '{"location": "Tokyo"}')],
        ),
        ("<|message|>Hi", "", "Hi", []),
        ("", "", "", []),
    ],
)
def test_messages_are_found_however_the_text_is_cut(
    text: str, reasoning: str, content: str, calls: list[Call]
) -> None:
    for size in (1, 2, 3, 7, 1000):
        assert parsed(pieces_of(text, size)) == (reasoning, content, calls), size
    # The mark at the end is where the model stops, and not part of the answer.
    for mark in (RETURN, CALL):
        if text.endswith(mark):
            assert parsed([text.removesuffix(mark)]) == (reasoning, content, calls)


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "assist",
        "assistants are",
        "to",
        " to=b",
        "<|chan",
        " ",
        "<b>4</b>",
        "t=2",
        "<|",
        "s<|en",
    ],
)
def test_an_answer_without_marks_is_content(text: str) -> None:
    """Also one that begins as a header does."""
    for size in (1, 2, 1000):
        assert parsed(pieces_of(text, size)) == ("", text, [])


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<|channel|>analysis I must refuse<|end|><|start|>assistant", "I must refuse", ""),
        ("<|channel|>final Hello", "", "Hello"),
        ("<|channel|>other words", "", "other words"),
        ("<|start|>assistant to=functions.f<|channel|>commentary{}<|call|>", "{}", ""),
        ("<|channel|>final<|message|>a<|end|>b", "", "ab"),
        ("<|channel|>final<|end|><|start|>assistant<|channel|>analysis<|message|>a", "a", ""),
        ("<|channel|>analysis<|message|>a<|end|>assistant<|channel|>final<|message|>b", "a", "b"),
        ("<|channel|>final<|message|>a<|end|>assistant b", "", "aassistant b"),
        ("<|channel|>final not a header<|message|>a", "", "not a headera"),
        ("<|channel|>final json<|message|>a", "", "a"),
        ("<|channel|>other<|message|>a", "", "a"),
        (
            "<|channel|>analysis??<|message|>a<|end|><|start|>assistant<|channel|>final ??"
            "<|message|>b",
            "a",
            "b",
        ),
        ("<|message|>a<|end|><|start|>functions.f to=x<|channel|>final<|message|>b", "b", "a"),
        ("<|channel|>anal", "", ""),
        ("<|channel|>commentary to=functions.nothing <|constrain|>js", "", ""),
        ("<|channel|>commentary to=functions.f a b", "a b", ""),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant to", "a", ""),
    ],
)
def test_broken_and_cut_headers_lose_no_text(text: str, reasoning: str, content: str) -> None:
    for size in (1, 2, 1000):
        assert parsed(pieces_of(text, size)) == (reasoning, content, []), size


@pytest.mark.parametrize(
    ("header", "kind"),
    [
        ("<|channel|>?? final<|message|>", "content"),
        ("??<|channel|>final<|message|>", "content"),
        ("<|channel|>final??<|constrain|>json<|message|>", "content"),
        ("<|channel|>final ?? json<|message|>", "content"),
        ("<|channel|>final\uff01\uff1f<|message|>", "content"),
        ("<|channel|>final\ufffd\ufffd<|message|>", "content"),
        ("<|channel|>?? analysis<|message|>", "reasoning"),
        ("<|channel|>commentary?? to=functions.f <|constrain|>json<|message|>", "call"),
        ("<|channel|>commentary to=functions.f ??<|constrain|>json<|message|>", "call"),
        ("<|channel|>commentary to= functions.f code??<|message|>", "call"),
        (" to=functions.f ??<|channel|>commentary<|message|>", "call"),
        ("?? to=functions.f<|channel|>commentary<|message|>", "call"),
    ],
)
def test_signs_in_headers_are_nothing(header: str, kind: str) -> None:
    """Wherever they are."""
    before = "<|channel|>analysis<|message|>a<|end|><|start|>assistant"
    for opening, thought in (("", ""), (before, "a")):
        for size in (1, 2, 1000):
            reasoning, content, calls = parsed(pieces_of(f"{opening}{header}{{}}", size))
            assert reasoning == thought + "{}" * (kind == "reasoning")
            assert content == "{}" * (kind == "content")
            assert calls == [("f", "{}")] * (kind == "call")


def test_signs_that_no_header_follows_are_text() -> None:
    for text in ("??", "- a", "... to be", "?? final", "!" * 300):
        for size in (1, 1000):
            assert parsed(pieces_of(text, size)) == ("", text, [])


@pytest.mark.parametrize(
    ("header", "names"),
    [
        ("<|channel|>commentary to=functions.", []),
        ("<|channel|>commentary to=functions.ge", []),
        ("<|channel|>commentary to=functions.get_w", ["get_weather"]),
        ("<|channel|>commentary to=functions.get_weather", ["get_weather"]),
        ("<|channel|>commentary to=functions.get <|constrain|>js", ["get"]),
        (" to=functions.python<|channel|>comm", ["python"]),
        (f"<|channel|>commentary to=functions.get {' ' * 300}json", []),
        (f"<|channel|>commentary to=functions.get {' ' * 200}json", ["get"]),
    ],
)
def test_a_call_whose_header_is_cut_has_begun(header: str, names: list[str]) -> None:
    """Also behind another call, which is whole."""
    first = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
    known = ("f", "get", "get_weather", "python")
    for before, calls in (("", []), (f"{first}<|start|>assistant", [("f", "{}")])):
        text = before + header
        for pieces in (pieces_of(text, 1), [text]):
            parser = HarmonyParser(known)
            found = [parser.feed(p, n == len(pieces) - 1) for n, p in enumerate(pieces)]
            told = [call for piece in found for call in piece.merge_calls().calls]
            named = [call.name for call in told if call.name]
            assert named == [name for name, _ in calls] + names
            assert parser.has_calls is (bool(calls) and not names)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f" to={'word ' * 200}", f" to={'word ' * 200}"),
        (" " * 1000, " " * 1000),
        (f"<|channel|>final {'word ' * 200}", "word " * 200),
        (f"<|channel|>final<|message|>a<|end|>{' ' * 1000}", f"a{' ' * 1000}"),
        (f"{' ' * 230}<|channel|>final<|message|>a", "a"),
        (f"{' ' * 257}<|channel|>final<|message|>a", f"{' ' * 257}<|channel|>final<|message|>a"),
    ],
)
def test_no_text_waits_for_long_for_the_end_of_a_header(text: str, shown: str) -> None:
    for size in (1, 2, 7, 2000):
        assert parsed(pieces_of(text, size)) == ("", shown, []), size
    parser = HarmonyParser()
    before_end = [parser.feed(piece).content for piece in text]
    assert len(shown) - len("".join(before_end)) < 2 * MAX_HEADER_CHARS


@pytest.mark.parametrize("names", [(), ("now",)])
def test_what_was_not_offered_is_not_a_call(names: tuple[str, ...]) -> None:
    found = parsed([WEATHER], names=names)
    assert found == (f"Need to use function get_weather.{WEATHER_ARGUMENTS}", "", [])


@pytest.mark.parametrize(
    ("opened", "text", "reasoning", "content"),
    [
        ("<|start|>assistant<|channel|>final<|message|>", "and a<|return|>", "", "and a"),
        ("<|start|>assistant<|channel|>final<|message|>", "assistant", "", "assistant"),
        ("<|start|>assistant<|channel|>final<|message|>", f"a<|end|>{OPENED}{SUM}", None, None),
        ("<|start|>assistant<|channel|>analysis<|message|>", f"a<|end|>{OPENED} b", "a", "b"),
        ("<|start|>assistant<|channel|>commentary to=x<|message|>", "a", "a", ""),
        ("<|start|>user<|message|>", "a", "", "a"),
        ("<|start|>assistant<|channel|>", "final<|message|>a", "", "a"),
        ("<|start|>", "assistant<|channel|>analysis<|message|>a", "a", ""),
        ("", f"{OPENED}<|channel|>analysis<|message|>a", "a", ""),
        ("", "assistants", "", "assistants"),
        ("", "<|sta", "", "<|sta"),
    ],
)
def test_an_answer_goes_on_where_the_prompt_ends(
    opened: str, text: str, reasoning: str | None, content: str | None
) -> None:
    if reasoning is None or content is None:
        after, before = parsed([SUM]), "a"
        reasoning, content = after[0], before + after[1]
    for size in (1, 2, 1000):
        assert parsed(pieces_of(text, size), opened=opened) == (reasoning, content, [])


@pytest.mark.parametrize(
    ("text", "is_complete"),
    [
        (WEATHER, True),
        (WEATHER.removesuffix(CALL), True),
        (WEATHER.removesuffix(f"{CALL}")[:-1], False),
        (WEATHER.replace(WEATHER_ARGUMENTS, ""), True),
        (WEATHER.replace(f"{WEATHER_ARGUMENTS}{CALL}", ""), False),
        (f"{WEATHER}{OPENED}<|channel|>commentary to=functions.f<|message|>{{", False),
        (WEATHER.replace(f"{WEATHER_ARGUMENTS}{CALL}", "17"), False),
        (WEATHER.replace(f"{WEATHER_ARGUMENTS}{CALL}", "[]"), False),
        (WEATHER.replace(WEATHER_ARGUMENTS, "17"), True),
        (WEATHER.replace(CALL, START), True),
        (WEATHER.replace(f"{WEATHER_ARGUMENTS}{CALL}", START), False),
    ],
)
def test_a_call_is_complete_at_its_mark_or_with_its_json(text: str, is_complete: bool) -> None:
    parser = HarmonyParser(NAMES)
    parser.feed(text, is_last=True)
    assert parser.num_begun > 0
    assert parser.has_calls is is_complete


@pytest.mark.parametrize("arguments", ["", " \n", "{", WEATHER_ARGUMENTS])
def test_a_mark_makes_a_call_complete(arguments: str) -> None:
    """Also one that is not in the text, since the model stops at it."""
    shown = arguments if arguments.strip() else f"{arguments}{{}}"
    text = WEATHER.replace(WEATHER_ARGUMENTS, arguments)
    for one in (text, text.removesuffix(CALL)):
        parser = HarmonyParser(NAMES)
        (call,) = parser.feed(one, is_last=True, ends_with_token=True).merge_calls().calls
        assert (call.arguments, parser.has_calls) == (shown, True)


class CountingParser(HarmonyParser):
    """Counts the characters that its steps look at."""

    num_chars = 0

    def _step(self, found: Any, is_last: bool) -> bool:
        self.num_chars += len(self._waiting)
        return super()._step(found, is_last)


def test_the_work_is_in_proportion_to_the_text() -> None:
    for message in ("<|channel|>analysis<|message|>a<|end|><|start|>assistant", "<|end|>", "a" * 9):
        work = []
        for count in (500, 2000):
            parser = CountingParser()
            parser.feed(message * count, is_last=True)
            work.append(parser.num_chars)
        assert work[1] < 8 * work[0]


def pieces_of(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def parsed(
    pieces: list[str], names: tuple[str, ...] = NAMES, opened: str = OPENED
) -> tuple[str, str, list[Call]]:
    """Reasoning, content and calls of an answer that came in pieces."""
    parser = HarmonyParser(names, opened)
    found = [*(parser.feed(piece) for piece in pieces), parser.feed("", is_last=True)]
    deltas = [delta for one in found for delta in one.calls]
    assert all((delta.call_id is None) is (delta.name is None) for delta in deltas)
    whole = ParsedPiece("", tuple(deltas)).merge_calls()
    calls = [(call.name or "", call.arguments) for call in whole.calls]
    assert len(calls) == parser.num_begun >= parser.num_complete
    return "".join(one.reasoning for one in found), "".join(one.content for one in found), calls


# ---- any answer, cut anywhere ---------------------------------------------------------------

HEADERS = (
    "<|channel|>analysis<|message|>",
    "<|channel|>final<|message|>",
    "<|channel|>commentary<|message|>",
    "<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
    " to=functions.f<|channel|>commentary json<|message|>",
    " to=browser.find<|channel|>analysis<|message|>",
)


def random_answer(draw: random.Random, num_words: int = 40) -> str:
    """Messages whose texts are numbered words in brackets, with up to three broken marks."""
    words = (f"[{number}]" for number in range(num_words))
    text = ""
    for _ in range(draw.randrange(1, 5)):
        body = " ".join(itertools.islice(words, draw.randrange(4)))
        text += draw.choice(HEADERS) + body + draw.choice((END, END, CALL, RETURN)) + OPENED
    text = text.removesuffix(OPENED)
    for _ in range(draw.choice((0, 0, 1, 2, 3))):
        text = broken(draw, text)
    return text


def broken(draw: random.Random, text: str) -> str:
    """The same with one mark gone, put in, or in place of another."""
    places = [found.span() for found in re.finditer("|".join(map(re.escape, SPECIAL_TOKENS)), text)]
    start, stop = draw.choice(places or [(0, 0)])
    return text[:start] + draw.choice(("", *SPECIAL_TOKENS)) + text[draw.choice((start, stop)) :]


def test_any_answer_is_the_same_in_pieces_and_loses_no_word() -> None:
    draw = random.Random(0)
    for _ in range(250):
        text = random_answer(draw)
        whole = parsed([text])
        for cut in range(len(text) + 1):
            assert parsed([text[:cut], text[cut:]]) == whole, (text, cut)
        assert parsed(list(text)) == whole, text
        shown = whole[0] + whole[1] + "".join(arguments for _, arguments in whole[2])
        words = sorted(re.findall(r"\[\d+\]", text))
        assert words == sorted(re.findall(r"\[\d+\]", shown)), text


def test_answers_that_end_early_lose_no_word() -> None:
    """As with ``max_tokens``: each beginning of an answer is read as an answer."""
    draw = random.Random(1)
    for _ in range(100):
        text = random_answer(draw)
        for cut in range(len(text)):
            reasoning, content, calls = parsed([text[:cut]])
            shown = reasoning + content + "".join(arguments for _, arguments in calls)
            words = sorted(re.findall(r"\[\d+\]", text[:cut]))
            assert words == sorted(re.findall(r"\[\d+\]", shown)), text[:cut]


def test_marks_and_words_in_any_order_are_the_same_in_pieces() -> None:
    draw = random.Random(2)
    parts = [
        CHANNEL,
        MESSAGE,
        CONSTRAIN,
        START,
        END,
        RETURN,
        CALL,
        "assistant",
        "analysis",
        "final",
    ]
    parts += ["commentary", " to=functions.f ", "json", '{"a": 1}', "<", "<|", "words ", "é", "\n"]
    opens = [OPENED, "", START, f"{OPENED}{CHANNEL}final{MESSAGE}", f"{OPENED}{CHANNEL}"]
    for _ in range(3000):
        text = "".join(draw.choices(parts, k=draw.randrange(12)))
        cuts = sorted(draw.randrange(len(text) + 1) for _ in range(draw.randrange(6)))
        bounds, opened = [0, *cuts, len(text)], draw.choice(opens)
        pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
        assert parsed(pieces, opened=opened) == parsed([text], opened=opened), (opened, text)


@pytest.mark.parametrize("header", ["to=functions.f??", "to=functions.f <|constrain|>json ??"])
def test_signs_in_a_header_are_no_name(header: str) -> None:
    text = f"<|channel|>commentary {header}<|message|>{{}}<|call|>"
    reasoning, content, calls = parsed(pieces_of(text, 1))
    assert (reasoning, content) == ("", "")
    assert [name for name, *_ in calls] == ["f"]
