"""Divides an answer into reasoning, words for the user and calls, as the text comes in.

    text ──mark──▶ [section ▶] head ──▶ arguments ──▶ tail ──▶ behind a call ──▶ text
      ▲  what is no head of an offered function is text: its mark, then what stands behind it
      └──────────────────────────────┘

Harmony has a parser of its own (``gateway.text.harmony.parser``).
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum, auto

from gateway.core.thinking import BEGIN, END, Thinking
from gateway.core.tool_use import ToolForm, ToolUse
from gateway.text.forms.arguments_reader import ArgumentsReader, ArgumentsState
from gateway.text.forms.call_ids import CallIds
from gateway.text.forms.call_syntax import SYNTAXES, CallSyntax, Slot
from gateway.text.forms.lookahead import Lookahead
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

_PIECE_CHARS = 4096
"""Read at a time, so that the work is in proportion to the text."""


class _State(Enum):
    START = auto()
    """Where reasoning may begin."""
    TEXT = auto()
    BEFORE_CALL = auto()
    """In a section."""
    HEAD = auto()
    ARGUMENTS = auto()
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
        self._ahead = Lookahead()
        pairs = self._syntax.pairs if self._syntax is not None else None
        self._arguments = ArgumentsReader(pairs, self._tools, self._ahead)
        self._passed = ""  # since a mark: text, if no call follows
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
            self._ahead.text += piece
            self._ahead.is_last = is_last and start + len(piece) == len(text)
            while self._step(found):
                pass
        if is_last and self._is_reasoning:
            found.add_text(self._breaks, is_reasoning=True)
        return found.piece()

    def _step(self, found: PieceBuilder) -> bool:
        """Read on; whether the state changed, so that there may be more."""
        match self._state:
            case _State.START:
                return self._read_start()
            case _State.TEXT:
                return self._read_text(found)
            case _State.BEFORE_CALL:
                return self._read_before_call(found)
            case _State.HEAD:
                return self._read_head(found)
            case _State.ARGUMENTS:
                return self._read_arguments(found)
            case _State.TAIL:
                return self._read_tail()
            case _State.AFTER_CALL:
                return self._read_after_call()

    # ---- text and reasoning ------------------------------------------------------------------

    def _read_start(self) -> bool:
        if self._ahead.may_begin((BEGIN,)) and self._ahead.waits:
            return False
        is_begun = self._ahead.skip(BEGIN)
        self._is_reasoning = self._skips_breaks = is_begun or self._thinking is Thinking.OPEN
        self._state = _State.TEXT
        return True

    def _read_text(self, found: PieceBuilder) -> bool:
        marks = [END] * self._is_reasoning + ([self._syntax.mark] if self._syntax else [])
        text, mark, rest = cut(self._ahead.text, marks)
        is_last = self._ahead.is_last
        if not mark and (kept := overlap(text, marks)) and not (is_last and self._keeps_marks):
            text, rest = text[: len(text) - kept], "" if is_last else text[len(text) - kept :]
        self._ahead.text = rest
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

    def _read_before_call(self, found: PieceBuilder) -> bool:
        """Up to the mark of a call, or to the section's end."""
        form, is_first = self._form, bool(self._passed)
        begin = form.begin if is_first or not form.next_begin else form.next_begin
        marks = [begin.strip()] + [form.section_end] * (not is_first)
        before = self._ahead.text
        if not is_first and self._ahead.skip(form.section_end):
            self._state = _State.TEXT
            return True
        if self._ahead.skip(marks[0]):
            self._passed += before[: len(before) - len(self._ahead.text)]
            self._state = _State.HEAD
            return True
        is_open = self._ahead.may_begin(marks)
        if is_open and self._ahead.waits:
            return False
        is_cut = is_open and self._ahead.has_room
        if is_cut and not is_first:
            self._ahead.text = ""  # the section's end is missing
        self._fail(found, is_cut)
        return True

    def _read_head(self, found: PieceBuilder) -> bool:
        form = self._form
        reading = read_parts(form.head, self._ahead.window)
        outcome = _look_ahead(reading, self._ahead.window, form.ahead)
        if outcome is Outcome.PARTIAL and self._ahead.waits:
            return False
        name = reading.slots.get(Slot.NAME, "")
        if outcome is not Outcome.WHOLE or name not in self._tools:
            is_cut = outcome is Outcome.PARTIAL and self._ahead.has_room
            cut_name = name_of_cut(name, self._ahead.words, self._tools) if is_cut else ""
            if cut_name and self._must_call:
                self._begin_call(cut_name, reading, found)
                self._passed, self._ahead.text, self._state = "", "", _State.TEXT
                return True
            self._fail(found, is_cut)
            return True
        self._begin_call(name, reading, found)
        self._ahead.text, self._passed = self._ahead.text[reading.end :].lstrip(), ""
        self._skips_breaks = False
        self._arguments.begin(name)
        self._state = _State.ARGUMENTS
        return True

    def _read_arguments(self, found: PieceBuilder) -> bool:
        before = self._arguments.state
        if written := self._arguments.read():
            found.add_call(CallDelta(self.num_begun - 1, written))
        match self._arguments.state:
            case ArgumentsState.COMPLETE:
                self.num_complete += 1
                self._state = _State.TAIL
            case ArgumentsState.BROKEN:
                self._state = _State.TEXT
            case state:
                return state is not before
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
            self._ahead.text = ""
        else:
            mark = self._form.mark if self._passed.startswith(self._form.mark) else ""
            self._ahead.text = self._passed[len(mark) :] + self._ahead.text
            self._take(mark, found)
        self._passed, self._state = "", _State.TEXT

    def _read_tail(self) -> bool:
        reading = read_parts(self._form.tail, self._ahead.window)
        end = reading.end
        if reading.outcome is Outcome.PARTIAL and self._ahead.has_room:
            if not self._ahead.is_last:
                return False
            end = len(self._ahead.text)
        self._ahead.text = self._ahead.text[end:]
        self._state = _State.BEFORE_CALL if self._form.section else _State.AFTER_CALL
        return True

    def _read_after_call(self) -> bool:
        """White space is text only where more text follows."""
        if self._ahead.skip(self._form.begin):
            self._passed, self._state = self._form.begin, _State.HEAD
            return True
        if self._ahead.may_begin((self._form.begin,)) and self._ahead.waits:
            return False
        if not self._ahead.words and self._ahead.has_room:
            self._ahead.text = ""
        self._state = _State.TEXT
        return True


def _look_ahead(reading: Reading, text: str, ahead: tuple[str, ...]) -> Outcome:
    """Whether a head is whole, and one of some texts stands behind it."""
    if reading.outcome is not Outcome.WHOLE:
        return reading.outcome
    behind = text[reading.end :].lstrip()
    if behind.startswith(ahead):
        return Outcome.WHOLE
    return Outcome.PARTIAL if may_begin(behind, ahead) else Outcome.BROKEN
