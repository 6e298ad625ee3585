"""Incremental parser that splits an answer into reasoning, content and tool calls.

    text ─delimiter─▶ [section ▶] head ──▶ arguments ──▶ tail ──▶ after a call ──▶ text
      ▲  without the head of an offered function, the delimiter and the rest are text
      └──────────────────────────────┘

Harmony has a separate parser (``gateway.text.harmony.parser``).
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
"""Number of characters read at a time, so that the work is linear in the length of the text."""


class _State(Enum):
    START = auto()
    """At the start, where reasoning may begin."""
    TEXT = auto()
    BEFORE_CALL = auto()
    """In a section, before a call or the end of the section."""
    HEAD = auto()
    ARGUMENTS = auto()
    TAIL = auto()
    AFTER_CALL = auto()
    """After a call, in formats without sections."""


class AnswerParser:
    """Parses one answer. The result does not depend on how the text is split into pieces.

    For example ``<think>Hm.</think>On it. <tool_call>\\n{"name": "f", "arguments": {"a": 1}}\\n
    </tool_call>`` is the reasoning ``Hm.``, the content ``On it. `` and one call of ``f``. Line
    breaks next to the reasoning tags are not part of the reasoning. The head of a call ends it.

    No text is lost: a delimiter without the head of a call is text, also if the end of the answer
    cuts it, unless the answer must be a call. Arguments are returned as they arrive: a call with
    unfinished arguments is incomplete, and text that interrupts them is content.

    Args:
        form: format of the calls; None parses no calls.
        use: the tools.
        thinking: where reasoning begins; None without reasoning.
        used_ids: ids of the calls in the conversation.
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
        self._breaks = ""  # line breaks at the end of the reasoning so far
        self._ahead = Lookahead()
        pairs = self._syntax.pairs if self._syntax is not None else None
        self._arguments = ArgumentsReader(pairs, self._tools, self._ahead)
        self._passed = ""  # text since a delimiter, which is content if no call follows
        self.num_begun = 0
        """Number of calls with a known name."""
        self.num_complete = 0
        """Number of calls with complete arguments."""

    @property
    def has_calls(self) -> bool:
        """Whether there are calls and the last one is complete."""
        return 0 < self.num_complete == self.num_begun

    def feed(self, text: str, is_last: bool = False) -> ParsedPiece:
        """Add ``text`` and return the final output; with ``is_last``, no text is held back."""
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
        """Parse the next part; return whether another call may parse more."""
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
        """Whether a delimiter that the end of the answer cuts is text."""
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

    # ---- the delimiters of calls -------------------------------------------------------------

    @property
    def _form(self) -> CallSyntax:
        assert self._syntax is not None, "only formats with a syntax have delimiters"
        return self._syntax

    def _read_before_call(self, found: PieceBuilder) -> bool:
        """Read up to the delimiter of a call, or up to the end of the section."""
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
        """Continue with text: the delimiter did not begin a call.

        Args:
            is_cut: whether the end of the answer cuts the possible call.
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
        """Read up to the next call or text; white space is text only if more text follows."""
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
    """Return the outcome of a head, which one of the texts ``ahead`` must follow."""
    if reading.outcome is not Outcome.WHOLE:
        return reading.outcome
    behind = text[reading.end :].lstrip()
    if behind.startswith(ahead):
        return Outcome.WHOLE
    return Outcome.PARTIAL if may_begin(behind, ahead) else Outcome.BROKEN
