"""Streaming equals the whole, for thousands of answers of every form, valid and broken.

Each answer is cut at all borders of tokens, at each of them alone, and between all characters; all
cuts give the same reasoning, content and calls, in the same order, and none loses a word.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import tokenizers

from gateway.core.thinking import Thinking
from gateway.core.tool_use import ToolCallFormat, ToolUse
from gateway.text.detokenizer import make_detokenizer
from gateway.text.harmony.parser import HarmonyParser
from gateway.text.harmony.special_tokens import MESSAGE, OPENED
from gateway.text.harmony.special_tokens import SPECIAL_TOKENS as HARMONY_MARKS
from gateway.text.tokenizer import Tokenizer
from gateway.text.tool_formats.answer_parser import AnswerParser
from gateway.text.tool_formats.lookahead import MAX_WAITING_CHARS
from gateway.text.tool_formats.tool_calls import ParsedPiece
from tests.gateway.fakes import tiny_backend
from tests.gateway.text.tool_formats.examples import (
    MARKS,
    TOKENS,
    TOOLS,
    USE,
    WEATHER,
    Parser,
    read,
    written,
)

pytestmark = pytest.mark.heavy

FORMS = (*ToolCallFormat, None)
FEW, MANY = 110, 10_000
_WORD = re.compile(r"w\d{4}[éß字ж😀]?x")
_TAILS = ("", "é", "ß", "字", "ж", "😀")
_HEADERS = ("analysis", "final", "commentary")


class _Harmony:
    """``HarmonyParser`` as an answer whose last token is text uses it."""

    def __init__(self, opened: str) -> None:
        self._parser = HarmonyParser([tool.name for tool in TOOLS], opened)

    @property
    def has_calls(self) -> bool:
        return self._parser.has_calls

    def feed(self, text: str, is_last: bool = False) -> ParsedPiece:
        return self._parser.feed(text, is_last)


@dataclass(frozen=True)
class Case:
    """One answer, and what reads it."""

    text: str
    form: ToolCallFormat | None
    use: ToolUse | None
    thinking: Thinking | None
    opened: str
    """What the prompt leaves open (Harmony)."""
    keeps_all: bool
    """It has no words where a form allows any."""
    keeps_marks: bool = False
    """Without calls all of it is content."""

    def make_parser(self) -> Parser:
        if self.form is ToolCallFormat.HARMONY:
            return _Harmony(self.opened)
        return AnswerParser(self.form, self.use, self.thinking)


@cache
def tokenizer() -> Tokenizer:
    """Bytes, a few merges, and the marks of all forms as tokens."""
    backend = tiny_backend()
    backend.add_special_tokens([*HARMONY_MARKS])
    backend.add_tokens([tokenizers.AddedToken(mark, special=False) for mark in TOKENS])
    return Tokenizer(backend)


def token_pieces(text: str) -> list[str]:
    """The text of each token as it becomes certain; most characters here are several tokens."""
    known = tokenizer()
    detokenizer = make_detokenizer(known, skip_special_tokens=False)
    pieces = [detokenizer.feed(token) for token in known.encode(text, False)]
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == text
    return pieces


class Writer:
    """Makes answers of one form from a seed."""

    def __init__(self, form: ToolCallFormat | None, seed: int) -> None:
        self._form = form
        self._random = random.Random(f"{form}/{seed}")
        self._num_words = 0

    def case(self) -> Case:
        rng = self._random
        is_broken = rng.random() < 0.6
        parts = [self._part(is_broken) for _ in range(rng.randrange(1, 6))]
        text = "".join(parts)
        if rng.random() < 0.3:
            text = text[: rng.randrange(len(text) + 1)]
        if self._form is ToolCallFormat.HARMONY:
            opened = rng.choice([OPENED, "", f"{OPENED}<|channel|>final{MESSAGE}"])
            return Case(text, self._form, USE, None, opened, keeps_all=not is_broken)
        form, thinking = self._form, rng.choice([None, *Thinking])
        use = None if form is None else ToolUse(tools=TOOLS, must_call=rng.random() < 0.2)
        keeps_all = use is None or not use.must_call
        keeps_marks = keeps_all and thinking is None
        return Case(text, form, use, thinking, "", keeps_all, keeps_marks)

    def _part(self, is_broken: bool) -> str:
        kinds = [self._words, self._words, self._calls, self._thought]
        if self._form is ToolCallFormat.HARMONY:
            kinds = [self._message, self._calls_in_messages]
        if is_broken:
            kinds += [self._mark, self._mark, self._torn_mark, self._broken_calls, self._odd]
        return self._random.choice(kinds)()

    def _word(self) -> str:
        """Each is in an answer once."""
        self._num_words += 1
        return f"w{self._num_words:04d}{self._random.choice(_TAILS)}x"

    def _words(self) -> str:
        space = self._random.choice([" ", "\n", " < ", '"', "\\", "} "])
        words = [self._word() for _ in range(self._random.randrange(1, 4))]
        return space.join(words) + self._random.choice(["", " ", "\n", "\n\n"])

    def _arguments(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "city": self._words(),
            "days": self._random.randrange(99),
            "where": self._random.choice([None, self._word()]),
            "places": [{"name": self._word()}],
            "is_short": True,
            "note": {self._word(): [1.5, '"]}']},
        }
        names = [name for name in WEATHER["properties"] if name in values]
        kept = [name for name in names if self._random.random() < 0.5]
        self._random.shuffle(kept)
        return {name: values[name] for name in kept}

    def _calls(self) -> str:
        count = self._random.randrange(1, 3)
        calls = [
            ("weather", self._arguments()) if self._random.random() < 0.8 else ("now", {})
            for _ in range(count)
        ]
        return written(self._form or ToolCallFormat.HERMES, calls)

    def _thought(self) -> str:
        inner = self._random.choice([self._words, self._words, self._calls])()
        opening = self._random.choice(["<think>", "<think>\n", "\n<think>", ""])
        return opening + inner + self._random.choice(["</think>", "\n</think>\n\n", ""])

    def _message(self) -> str:
        channel, end = self._random.choice(_HEADERS), "<|end|><|start|>assistant"
        return f"<|channel|>{channel}<|message|>{self._words()}{end}"

    def _calls_in_messages(self) -> str:
        return f"{self._calls()}<|call|><|start|>assistant"

    def _mark(self) -> str:
        known = [
            *MARKS.get(self._form or ToolCallFormat.HERMES, HARMONY_MARKS),
            "<think>",
            "</think>",
        ]
        return self._random.choice(known)

    def _torn_mark(self) -> str:
        mark = self._mark()
        return mark[: self._random.randrange(len(mark))]

    def _broken_calls(self) -> str:
        text = self._random.choice([self._calls, self._thought])()
        start = self._random.randrange(len(text) + 1)
        end = min(len(text), start + self._random.randrange(12))
        known = ["", self._words(), self._mark(), "{", "}", '"', "\n", "never", self._wide()]
        new = self._random.choice(known)
        kept = text[start:end] if _WORD.search(text[max(0, start - 8) : end + 8]) else ""
        return text[:start] + kept + new + text[end:]

    def _odd(self) -> str:
        blanks = f"{self._mark()}{self._wide()}{self._word()}"
        return self._random.choice(["{}", "[", "\\", "\t", '{"name": "now"', "```", blanks])

    def _wide(self) -> str:
        """About as much white space as a parser waits for."""
        return " " * (MAX_WAITING_CHARS + self._random.randrange(-60, 9))


def cuts(text: str) -> Iterator[tuple[str, list[str]]]:
    """Ways to cut a text, by name."""
    pieces = token_pieces(text)
    yield "all tokens", pieces
    yield "all characters", list(text)
    place = 0
    for piece in pieces[:-1]:
        place += len(piece)
        yield f"at {place}", [text[:place], text[place:]]


def check(case: Case) -> None:
    whole = _read_at_once(case)
    for name, pieces in cuts(case.text):
        assert read(case.make_parser(), pieces) == whole, (name, case.text)
    if case.keeps_marks and all(kind == "content" for kind, _ in whole[0]):
        assert "".join(text for _, text in whole[0]) == case.text
    if not case.keeps_all:
        return
    found = Counter(_WORD.findall("\n".join(text for _, text in whole[0])))
    assert found == Counter(_WORD.findall(case.text)), (case.text, whole)


def _read_at_once(case: Case) -> tuple[list[tuple[str, str]], bool]:
    """As answers are read that are not streamed."""
    parser = case.make_parser()
    piece = parser.feed(case.text, is_last=True)
    found = read(_Done(piece, parser), [])
    for kind, text in (("reasoning", piece.reasoning), ("content", piece.content)):
        assert "".join(part for name, part in found[0] if name == kind) == text
    calls = [(f"{call.index} {call.name}", call.arguments) for call in piece.merge_calls().calls]
    assert Counter(calls) == Counter(_joined_calls(found[0]))
    return found


def _joined_calls(parts: list[tuple[str, str]]) -> list[tuple[str, str]]:
    joined: dict[str, str] = {}
    for kind, text in parts:
        if kind not in ("reasoning", "content"):
            joined[kind] = joined.get(kind, "") + text
    return list(joined.items())


@dataclass
class _Done:
    """What a parser has found already."""

    piece: ParsedPiece
    parser: Parser

    @property
    def has_calls(self) -> bool:
        return self.parser.has_calls

    def feed(self, text: str, is_last: bool = False) -> ParsedPiece:
        return self.piece


@pytest.mark.parametrize("form", FORMS)
def test_streaming_equals_the_whole(form: ToolCallFormat | None) -> None:
    for seed in range(FEW // len(FORMS)):
        check(Writer(form, seed).case())


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("form", FORMS)
def test_streaming_equals_the_whole_for_thousands(form: ToolCallFormat | None) -> None:
    """10,000 answers over all forms."""
    for seed in range(-(-MANY // len(FORMS))):
        check(Writer(form, seed).case())


def test_the_answers_are_of_all_kinds() -> None:
    """Else the tests above would say little."""
    seen: Counter[str] = Counter()
    for form in FORMS:
        for seed in range(40):
            case = Writer(form, seed).case()
            parts, has_calls = _read_at_once(case)
            seen.update(kind.partition(" ")[2] or kind for kind, _ in parts)
            seen["complete" if has_calls else "not complete"] += 1
            seen["objects"] += sum(_is_object(text) for _, text in _joined_calls(parts))
    for kind in ("reasoning", "content", "weather", "now", "complete", "not complete", "objects"):
        assert seen[kind] >= 40, (kind, seen)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
