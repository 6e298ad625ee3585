"""Divides an answer into reasoning, words for the user and calls, as the text comes in.

    text ──mark──▶ [section ▶] head ──▶ arguments ──▶ tail ──▶ behind a call ──▶ text
      ▲  what is no head of an offered function is text: its mark, then what stands behind it
      └──────────────────────────────┘

Harmony has a parser of its own (``gateway.text.harmony.parser``).
"""

from __future__ import annotations

import json
from collections.abc import Collection
from enum import Enum, auto

from gateway.core.thinking import BEGIN, END, Thinking
from gateway.core.tool_use import ToolForm, ToolUse
from gateway.text.forms.argument_text import ArgumentText, ObjectEnd
from gateway.text.forms.argument_values import ValueReader
from gateway.text.forms.call_ids import CallIds
from gateway.text.forms.call_syntax import SYNTAXES, CallSyntax, PairSyntax, Slot
from gateway.text.forms.marks import (
    Outcome,
    Reading,
    cut,
    may_begin,
    name_of_cut,
    overlap,
    read_parts,
)
from gateway.text.forms.tool_calls import CallDelta, ParsedPiece, PieceBuilder

MAX_WAITING_CHARS = 512
"""What is longer without being a head, or what else a form asks for, is text, so that no client
waits for its end."""
_PIECE_CHARS = 4096
"""Read at a time, so that the work is in proportion to the text."""


class _State(Enum):
    START = auto()
    """Where reasoning may begin."""
    TEXT = auto()
    BEFORE_CALL = auto()
    """In a section."""
    HEAD = auto()
    OBJECT = auto()
    """Arguments as a JSON object."""
    PAIR = auto()
    """Between arguments that are written one by one."""
    VALUE = auto()
    TAIL = auto()
    AFTER_CALL = auto()
    """Where there are no sections."""


class AnswerParser:
    """Reads one answer. The result does not depend on how the text was cut into pieces.

    For example ``<think>Hm.</think>On it. <tool_call>\\n{"name": "f", "arguments": {"a": 1}}\\n
    </tool_call>`` is the reasoning ``Hm.``, the content ``On it. `` and one call of ``f``. Line
    breaks next to the marks of reasoning do not belong to it. The head of a call ends reasoning.

    No text is lost: a mark without the head of a call behind it is text, also if the answer's end
    cuts it, unless the answer must be a call. Arguments are passed on as they come: a call whose
    arguments do not end is not complete, and text that breaks them off is content.

    Args:
        form: how calls are written; None reads none.
        use: what may be called.
        thinking: where reasoning begins; None: there is none.
        used_ids: those of the conversation's calls.
    """

    def __init__(
        self,
        form: ToolForm | None = None,
        use: ToolUse | None = None,
        thinking: Thinking | None = None,
        used_ids: Collection[str] = (),
    ) -> None:
        self._ids = CallIds(form, used_ids)
        self._syntax = None if form is None or use is None else SYNTAXES[form]
        self._tools = {tool.name: tool for tool in use.allowed} if use else {}
        self._must_call = use is not None and use.must_call
        self._thinking = thinking
        self._state = _State.TEXT if thinking is None else _State.START
        self._is_reasoning = False
        self._skips_breaks = False
        self._breaks = ""  # at the end of reasoning so far
        self._waiting = ""
        self._passed = ""  # since a mark: text, if no call follows
        self._json = ObjectEnd()
        self._readers: dict[str, ValueReader] = {}
        self._values: ValueReader | None = None
        self._has_pairs = False
        self._value: ArgumentText | None = None
        self.num_begun = 0
        """Calls whose name is known."""
        self.num_complete = 0
        """Calls whose arguments are all there."""

    @property
    def has_calls(self) -> bool:
        """There are calls, and the last one is complete."""
        return 0 < self.num_complete == self.num_begun

    def feed(self, text: str, is_last: bool = False) -> ParsedPiece:
        """What is certain after ``text``; with ``is_last`` nothing waits any more."""
        found = PieceBuilder()
        for start in range(0, max(len(text), 1), _PIECE_CHARS):
            piece = text[start : start + _PIECE_CHARS]
            self._waiting += piece
            is_end = is_last and start + len(piece) == len(text)
            while self._step(found, is_end):
                pass
        if is_last and self._is_reasoning:
            found.add_text(self._breaks, is_reasoning=True)
        return found.piece()

    def _step(self, found: PieceBuilder, is_last: bool) -> bool:
        """Read on; whether the state changed, so that there may be more."""
        match self._state:
            case _State.START:
                return self._read_start(is_last)
            case _State.TEXT:
                return self._read_text(found, is_last)
            case _State.BEFORE_CALL:
                return self._read_before_call(found, is_last)
            case _State.HEAD:
                return self._read_head(found, is_last)
            case _State.OBJECT:
                return self._read_object(found)
            case _State.PAIR:
                return self._read_pair(found, is_last)
            case _State.VALUE:
                return self._read_value(found, is_last)
            case _State.TAIL:
                return self._read_tail(is_last)
            case _State.AFTER_CALL:
                return self._read_after_call(is_last)

    @property
    def _window(self) -> str:
        """What is looked at, so that all cuts of a text lead to the same decisions."""
        return self._waiting[:MAX_WAITING_CHARS]

    @property
    def _words(self) -> str:
        return self._window.lstrip()

    @property
    def _has_room(self) -> bool:
        """What is not whole could have become so."""
        return len(self._waiting) < MAX_WAITING_CHARS

    def _waits(self, is_last: bool) -> bool:
        """Whether what is not whole may still become so."""
        return not is_last and self._has_room

    def _skip(self, mark: str) -> bool:
        """Drop a mark, with white space before it, if it comes next."""
        if not self._words.startswith(mark):
            return False
        self._waiting = self._waiting.lstrip()[len(mark) :]
        return True

    # ---- text and reasoning ------------------------------------------------------------------

    def _read_start(self, is_last: bool) -> bool:
        if may_begin(self._words, (BEGIN,)) and self._waits(is_last):
            return False
        is_begun = self._skip(BEGIN)
        self._is_reasoning = self._skips_breaks = is_begun or self._thinking is Thinking.OPEN
        self._state = _State.TEXT
        return True

    def _read_text(self, found: PieceBuilder, is_last: bool) -> bool:
        marks = [END] * self._is_reasoning + ([self._syntax.mark] if self._syntax else [])
        text, mark, rest = cut(self._waiting, marks)
        if not mark and (kept := overlap(text, marks)) and not (is_last and self._keeps_marks):
            text, rest = text[: len(text) - kept], "" if is_last else text[len(text) - kept :]
        self._waiting = rest
        self._take(text, found)
        if mark == END and self._is_reasoning:
            self._end_reasoning()
        elif mark:
            self._passed = mark
            has_section = self._syntax is not None and bool(self._syntax.section)
            self._state = _State.BEFORE_CALL if has_section else _State.HEAD
        return bool(mark)

    @property
    def _keeps_marks(self) -> bool:
        """A mark that the answer's end cuts is text."""
        return self._is_reasoning or not self._must_call

    def _take(self, text: str, found: PieceBuilder) -> None:
        if self._skips_breaks:
            text = text.lstrip("\n")
        if not text:
            return
        self._skips_breaks = False
        if self._is_reasoning:
            whole = self._breaks + text
            text = whole.rstrip("\n")
            self._breaks = whole[len(text) :]
        found.add_text(text, self._is_reasoning)

    def _end_reasoning(self) -> None:
        self._is_reasoning, self._skips_breaks, self._breaks = False, True, ""

    # ---- the marks of calls ------------------------------------------------------------------

    @property
    def _form(self) -> CallSyntax:
        assert self._syntax is not None, "without a form no mark is looked for"
        return self._syntax

    def _read_before_call(self, found: PieceBuilder, is_last: bool) -> bool:
        """Up to the mark of a call, or to the section's end."""
        form, is_first = self._form, bool(self._passed)
        begin = form.begin if is_first or not form.next_begin else form.next_begin
        marks = [begin.strip()] + [form.section_end] * (not is_first)
        before = self._waiting
        if not is_first and self._skip(form.section_end):
            self._state = _State.TEXT
            return True
        if self._skip(marks[0]):
            self._passed += before[: len(before) - len(self._waiting)]
            self._state = _State.HEAD
            return True
        is_open = may_begin(self._words, marks)
        if is_open and self._waits(is_last):
            return False
        is_cut = is_open and self._has_room
        if is_cut and not is_first:
            self._waiting = ""  # the section's end is missing
        self._fail(found, is_cut)
        return True

    def _read_head(self, found: PieceBuilder, is_last: bool) -> bool:
        form = self._form
        reading = read_parts(form.head, self._window)
        outcome = _look_ahead(reading, self._window, form.ahead)
        if outcome is Outcome.PARTIAL and self._waits(is_last):
            return False
        name = reading.slots.get(Slot.NAME, "")
        if outcome is not Outcome.WHOLE or name not in self._tools:
            is_cut = outcome is Outcome.PARTIAL and self._has_room
            cut_name = name_of_cut(name, self._words, self._tools) if is_cut else ""
            if cut_name and self._must_call:
                self._begin_call(cut_name, reading, found)
                self._passed, self._waiting, self._state = "", "", _State.TEXT
                return True
            self._fail(found, is_cut)
            return True
        self._begin_call(name, reading, found)
        self._waiting, self._passed = self._waiting[reading.end :].lstrip(), ""
        self._skips_breaks = False
        if form.pairs is None:
            self._json, self._state = ObjectEnd(), _State.OBJECT
        else:
            self._values = self._readers.setdefault(name, ValueReader(self._tools[name]))
            self._has_pairs, self._state = False, _State.PAIR
        return True

    def _begin_call(self, name: str, reading: Reading, found: PieceBuilder) -> None:
        if self._is_reasoning:
            self._end_reasoning()
        call_id = self._ids.new(name, reading.slots.get(Slot.NUMBER) or None)
        found.add_call(CallDelta(self.num_begun, "", call_id, name))
        self.num_begun += 1

    def _fail(self, found: PieceBuilder, is_cut: bool) -> None:
        """Go on with text: what looked like a call is none.

        Args:
            is_cut: the answer's end cuts it.
        """
        if is_cut and not self._keeps_marks:
            self._waiting = ""
        else:
            mark = self._form.mark if self._passed.startswith(self._form.mark) else ""
            self._waiting = self._passed[len(mark) :] + self._waiting
            self._take(mark, found)
        self._passed, self._state = "", _State.TEXT

    def _read_tail(self, is_last: bool) -> bool:
        reading = read_parts(self._form.tail, self._window)
        end = reading.end
        if reading.outcome is Outcome.PARTIAL and self._has_room:
            if not is_last:
                return False
            end = len(self._waiting)
        self._waiting = self._waiting[end:]
        self._state = _State.BEFORE_CALL if self._form.section else _State.AFTER_CALL
        return True

    def _read_after_call(self, is_last: bool) -> bool:
        """White space is text only where more text follows."""
        if self._skip(self._form.begin):
            self._passed, self._state = self._form.begin, _State.HEAD
            return True
        if may_begin(self._words, (self._form.begin,)) and self._waits(is_last):
            return False
        if not self._words and self._has_room:
            self._waiting = ""
        self._state = _State.TEXT
        return True

    # ---- arguments ---------------------------------------------------------------------------

    def _add(self, arguments: str, found: PieceBuilder) -> None:
        if arguments:
            found.add_call(CallDelta(self.num_begun - 1, arguments))

    def _read_object(self, found: PieceBuilder) -> bool:
        piece, is_end = self._json.read(self._waiting)
        self._waiting = self._waiting[len(piece) :]
        self._add(piece, found)
        if is_end:
            self.num_complete += 1
            self._state = _State.TAIL
        return is_end

    def _read_pair(self, found: PieceBuilder, is_last: bool) -> bool:
        """Up to the next value, or to the end of the arguments."""
        pairs = self._form.pairs
        assert pairs is not None, "only forms with pairs come here"
        if self._skip(pairs.close):
            self._add("}" if self._has_pairs else "{}", found)
            self.num_complete += 1
            self._state = _State.TAIL
            return True
        reading = read_parts(pairs.head, self._window)
        is_open = reading.outcome is Outcome.PARTIAL or may_begin(self._words, (pairs.close,))
        if is_open and self._waits(is_last):
            return False
        key = reading.slots.get(Slot.KEY, "")
        opening = (", " if self._has_pairs else "{") + json.dumps(key, ensure_ascii=False)
        if reading.outcome is Outcome.WHOLE:
            self._add(f"{opening}: ", found)
            self._has_pairs = True
            assert self._values is not None, "a head was read"
            writer = self._values.writer(key, reading.slots.get(Slot.IS_TEXT))
            self._value = ArgumentText(writer, pairs)
            self._waiting, self._state = self._waiting[reading.end :], _State.VALUE
            return True
        if is_open and self._has_room:
            key = _without_mark(key, pairs)
            opening = (", " if self._has_pairs else "{") + json.dumps(key, ensure_ascii=False)
            self._add(opening[:-1] if key else "", found)
            self._waiting = ""
        self._state = _State.TEXT
        return True

    def _read_value(self, found: PieceBuilder, is_last: bool) -> bool:
        assert self._value is not None, "the state says so"
        self._waiting, written, is_end = self._value.read(self._waiting, is_last)
        self._add(written, found)
        if is_end:
            self._state = _State.PAIR
        return is_end


def _look_ahead(reading: Reading, text: str, ahead: tuple[str, ...]) -> Outcome:
    """Whether a head is whole, and one of some texts stands behind it."""
    if reading.outcome is not Outcome.WHOLE:
        return reading.outcome
    behind = text[reading.end :].lstrip()
    if behind.startswith(ahead):
        return Outcome.WHOLE
    return Outcome.PARTIAL if may_begin(behind, ahead) else Outcome.BROKEN


def _without_mark(key: str, pairs: PairSyntax) -> str:
    """The name of an argument without the beginning of the mark behind it."""
    end = str(pairs.head[pairs.head.index(Slot.KEY) + 1]).strip()
    return key[: len(key) - overlap(key, (end,))]
