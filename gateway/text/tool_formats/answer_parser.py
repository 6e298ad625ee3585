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
from gateway.core.tool_use import ToolCallFormat, ToolUse
from gateway.text.tool_formats.arguments_reader import ArgumentsReader, ArgumentsState
from gateway.text.tool_formats.call_ids import CallIdGenerator
from gateway.text.tool_formats.call_syntax import SYNTAXES, CallSyntax, Placeholder
from gateway.text.tool_formats.delimiters import (
    MatchOutcome,
    TemplateMatch,
    is_delimiter_prefix,
    match_parts,
    partial_delimiter_length,
    resolve_partial_name,
    split_at_delimiter,
)
from gateway.text.tool_formats.lookahead import Lookahead
from gateway.text.tool_formats.tool_calls import CallDelta, ParsedPiece, PieceBuilder

_PIECE_CHARS = 4096
"""Number of characters parsed at a time, so that the work is linear in the length of the text."""


class _ParserState(Enum):
    START = auto()
    """At the start of the answer, where reasoning may begin."""
    TEXT = auto()
    BEFORE_CALL = auto()
    """In a section (delimited list of calls), before a call or the end of the section."""
    HEAD = auto()
    ARGUMENTS = auto()
    TAIL = auto()
    AFTER_CALL = auto()
    """After a call, in formats without sections (delimited lists of calls)."""


class AnswerParser:
    """Parses one answer of a model into reasoning, content and tool calls, piece by piece.

    The result does not depend on how the text is split into pieces. For example
    ``<think>Hm.</think>On it. <tool_call>\\n{"name": "f", "arguments": {"a": 1}}\\n
    </tool_call>`` is the reasoning ``Hm.``, the content ``On it. `` and one call of ``f``. Line
    breaks next to ``<think>`` and ``</think>`` do not belong to the reasoning. The head of a call,
    which names the function, also ends the reasoning.

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
        form: ToolCallFormat | None = None,
        use: ToolUse | None = None,
        thinking: Thinking | None = None,
        used_ids: Collection[str] = (),
    ) -> None:
        self._ids = CallIdGenerator(form, used_ids)
        self._syntax = None if form is None or use is None else SYNTAXES[form]
        self._tools = {tool.name: tool for tool in use.allowed} if use else {}
        self._must_call = use is not None and use.must_call
        self._thinking = thinking
        self._state = _ParserState.TEXT if thinking is None else _ParserState.START
        self._is_reasoning = False
        self._skips_line_breaks = False
        self._line_breaks = ""  # line breaks at the end of the reasoning so far
        self._lookahead = Lookahead()
        pairs = self._syntax.pairs if self._syntax is not None else None
        self._arguments = ArgumentsReader(pairs, self._tools, self._lookahead)
        self._unconfirmed_text = ""  # text since a delimiter; content if no call follows
        self.num_begun = 0
        """Number of tool calls in the answer whose function name is known."""
        self.num_complete = 0
        """Number of tool calls in the answer with complete arguments."""

    @property
    def has_calls(self) -> bool:
        """Whether the answer has tool calls and all of them are complete."""
        return 0 < self.num_complete == self.num_begun

    def feed(self, text: str, is_last: bool = False) -> ParsedPiece:
        """Add the next piece of the answer and return the parsed output that is final.

        With ``is_last``, the answer ends with ``text`` and no text is held back.
        """
        output = PieceBuilder()
        for start in range(0, max(len(text), 1), _PIECE_CHARS):
            piece = text[start : start + _PIECE_CHARS]
            self._lookahead.text += piece
            self._lookahead.is_last = is_last and start + len(piece) == len(text)
            while self._step(output):
                pass
        if is_last and self._is_reasoning:
            output.add_text(self._line_breaks, is_reasoning=True)
        return output.build()

    def _step(self, output: PieceBuilder) -> bool:
        """Parse the next part of the waiting text; return whether another step may parse more."""
        match self._state:
            case _ParserState.START:
                return self._read_start()
            case _ParserState.TEXT:
                return self._read_text(output)
            case _ParserState.BEFORE_CALL:
                return self._read_before_call(output)
            case _ParserState.HEAD:
                return self._read_head(output)
            case _ParserState.ARGUMENTS:
                return self._read_arguments(output)
            case _ParserState.TAIL:
                return self._read_tail()
            case _ParserState.AFTER_CALL:
                return self._read_after_call()

    # ---- text and reasoning ------------------------------------------------------------------

    def _read_start(self) -> bool:
        if self._lookahead.is_prefix_of((BEGIN,)) and self._lookahead.needs_more_text:
            return False
        is_begun = self._lookahead.skip_delimiter(BEGIN)
        self._is_reasoning = self._skips_line_breaks = is_begun or self._thinking is Thinking.OPEN
        self._state = _ParserState.TEXT
        return True

    def _read_text(self, output: PieceBuilder) -> bool:
        delimiters = [END] * self._is_reasoning + (
            [self._syntax.first_delimiter] if self._syntax else []
        )
        text, delimiter, rest = split_at_delimiter(self._lookahead.text, delimiters)
        is_last = self._lookahead.is_last
        if (
            not delimiter
            and (kept := partial_delimiter_length(text, delimiters))
            and not (is_last and self._keeps_partial_delimiters)
        ):
            text, rest = text[: len(text) - kept], "" if is_last else text[len(text) - kept :]
        self._lookahead.text = rest
        self._add_text(text, output)
        if delimiter == END and self._is_reasoning:
            self._end_reasoning()
        elif delimiter:
            self._unconfirmed_text = delimiter
            has_section = self._syntax is not None and bool(self._syntax.section)
            self._state = _ParserState.BEFORE_CALL if has_section else _ParserState.HEAD
        return bool(delimiter)

    @property
    def _keeps_partial_delimiters(self) -> bool:
        """Whether a delimiter that the end of the answer cuts off is kept as text."""
        return self._is_reasoning or not self._must_call

    def _add_text(self, text: str, output: PieceBuilder) -> None:
        if self._skips_line_breaks:
            text = text.lstrip("\n")
        if not text:
            return
        self._skips_line_breaks = False
        if self._is_reasoning:
            whole = self._line_breaks + text
            text = whole.rstrip("\n")
            self._line_breaks = whole[len(text) :]
        output.add_text(text, self._is_reasoning)

    def _end_reasoning(self) -> None:
        self._is_reasoning, self._skips_line_breaks, self._line_breaks = False, True, ""

    # ---- the delimiters of calls -------------------------------------------------------------

    @property
    def _call_syntax(self) -> CallSyntax:
        assert self._syntax is not None, "only formats with a syntax have delimiters"
        return self._syntax

    def _read_before_call(self, output: PieceBuilder) -> bool:
        """Read up to the delimiter of a tool call, or up to the end of the section of calls."""
        form, is_first = self._call_syntax, bool(self._unconfirmed_text)
        begin = form.begin if is_first or not form.next_begin else form.next_begin
        delimiters = [begin.strip()] + [form.section_end] * (not is_first)
        before = self._lookahead.text
        if not is_first and self._lookahead.skip_delimiter(form.section_end):
            self._state = _ParserState.TEXT
            return True
        if self._lookahead.skip_delimiter(delimiters[0]):
            self._unconfirmed_text += before[: len(before) - len(self._lookahead.text)]
            self._state = _ParserState.HEAD
            return True
        is_open = self._lookahead.is_prefix_of(delimiters)
        if is_open and self._lookahead.needs_more_text:
            return False
        is_cut = is_open and self._lookahead.may_grow
        if is_cut and not is_first:
            self._lookahead.text = ""  # the section's end is missing
        self._continue_as_text(output, is_cut)
        return True

    def _read_head(self, output: PieceBuilder) -> bool:
        form = self._call_syntax
        reading = match_parts(form.head, self._lookahead.window)
        outcome = _check_head(reading, self._lookahead.window, form.texts_after_head)
        if outcome is MatchOutcome.PARTIAL and self._lookahead.needs_more_text:
            return False
        name = reading.values.get(Placeholder.NAME, "")
        if outcome is not MatchOutcome.WHOLE or name not in self._tools:
            is_cut = outcome is MatchOutcome.PARTIAL and self._lookahead.may_grow
            cut_name = (
                resolve_partial_name(name, self._lookahead.stripped_window, self._tools)
                if is_cut
                else ""
            )
            if cut_name and self._must_call:
                self._begin_call(cut_name, reading, output)
                self._unconfirmed_text, self._lookahead.text, self._state = (
                    "",
                    "",
                    _ParserState.TEXT,
                )
                return True
            self._continue_as_text(output, is_cut)
            return True
        self._begin_call(name, reading, output)
        self._lookahead.text, self._unconfirmed_text = (
            self._lookahead.text[reading.end :].lstrip(),
            "",
        )
        self._skips_line_breaks = False
        self._arguments.begin(name)
        self._state = _ParserState.ARGUMENTS
        return True

    def _read_arguments(self, output: PieceBuilder) -> bool:
        before = self._arguments.state
        if written := self._arguments.read():
            output.add_call(CallDelta(self.num_begun - 1, written))
        match self._arguments.state:
            case ArgumentsState.COMPLETE:
                self.num_complete += 1
                self._state = _ParserState.TAIL
            case ArgumentsState.BROKEN:
                self._state = _ParserState.TEXT
            case state:
                return state is not before
        return True

    def _begin_call(self, name: str, reading: TemplateMatch, output: PieceBuilder) -> None:
        if self._is_reasoning:
            self._end_reasoning()
        call_id = self._ids.new(name, reading.values.get(Placeholder.NUMBER) or None)
        output.add_call(CallDelta(self.num_begun, "", call_id, name))
        self.num_begun += 1

    def _continue_as_text(self, output: PieceBuilder, is_cut: bool) -> None:
        """Continue with text, since a delimiter did not begin a tool call.

        Args:
            is_cut: whether the end of the answer cuts off the possible call.
        """
        if is_cut and not self._keeps_partial_delimiters:
            self._lookahead.text = ""
        else:
            delimiter = (
                self._call_syntax.first_delimiter
                if self._unconfirmed_text.startswith(self._call_syntax.first_delimiter)
                else ""
            )
            self._lookahead.text = self._unconfirmed_text[len(delimiter) :] + self._lookahead.text
            self._add_text(delimiter, output)
        self._unconfirmed_text, self._state = "", _ParserState.TEXT

    def _read_tail(self) -> bool:
        reading = match_parts(self._call_syntax.tail, self._lookahead.window)
        end = reading.end
        if reading.outcome is MatchOutcome.PARTIAL and self._lookahead.may_grow:
            if not self._lookahead.is_last:
                return False
            end = len(self._lookahead.text)
        self._lookahead.text = self._lookahead.text[end:]
        self._state = (
            _ParserState.BEFORE_CALL if self._call_syntax.section else _ParserState.AFTER_CALL
        )
        return True

    def _read_after_call(self) -> bool:
        """Read up to the next call or text; white space is text only if more text follows."""
        if self._lookahead.skip_delimiter(self._call_syntax.begin):
            self._unconfirmed_text, self._state = self._call_syntax.begin, _ParserState.HEAD
            return True
        if (
            self._lookahead.is_prefix_of((self._call_syntax.begin,))
            and self._lookahead.needs_more_text
        ):
            return False
        if not self._lookahead.stripped_window and self._lookahead.may_grow:
            self._lookahead.text = ""
        self._state = _ParserState.TEXT
        return True


def _check_head(reading: TemplateMatch, text: str, ahead: tuple[str, ...]) -> MatchOutcome:
    """Return the outcome of matching the head of a tool call (the part with the function's name).

    One of the texts ``ahead`` must follow the head.
    """
    if reading.outcome is not MatchOutcome.WHOLE:
        return reading.outcome
    following = text[reading.end :].lstrip()
    if following.startswith(ahead):
        return MatchOutcome.WHOLE
    return MatchOutcome.PARTIAL if is_delimiter_prefix(following, ahead) else MatchOutcome.BROKEN
