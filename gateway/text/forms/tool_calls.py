"""From an answer's text to the calls in it, as the text comes in."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from enum import Enum, auto
from itertools import groupby

from gateway.core.tool_use import ToolForm

_NAME = '{"name": "'
_ARGUMENTS = '"arguments": '


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of one call. The first has id and name; the arguments of all are to be joined."""

    index: int
    """Which call of the answer."""
    arguments: str
    """A piece of JSON text."""
    call_id: str | None = None
    """In the first piece."""
    name: str | None = None
    """In the first piece."""


@dataclass(frozen=True, slots=True)
class ParsedPiece:
    """What a piece of text turned out to be."""

    content: str
    calls: tuple[CallDelta, ...] = ()
    reasoning: str = ""
    """What the model says to itself, where its form tells that apart."""

    def joined(self) -> ParsedPiece:
        """The same of a whole answer, with one piece for each call."""
        calls: list[CallDelta] = []
        for _, pieces in groupby(self.calls, key=lambda call: call.index):
            first, *rest = pieces
            calls.append(replace(first, arguments="".join(piece.arguments for piece in rest)))
        return replace(self, calls=tuple(calls))


class _State(Enum):
    TEXT = auto()
    BEFORE = auto()
    NAME = auto()
    GAP = auto()
    ARGUMENTS = auto()


class ToolParser:
    """Reads one answer that follows ``tools.tool_grammar``.

    The result does not depend on how the text was cut into pieces. For example
    ``On it. <tool_call>\\n{"name": "f", "arguments": {"a": 1}}\\n</tool_call>`` is the content
    ``On it. `` and one call of ``f``. A mark that the answer's end cut is text, unless the answer
    must be a call.
    """

    def __init__(self, form: ToolForm, must_call: bool = False) -> None:
        self._mark = form.value
        self._must_call = must_call
        self._state = _State.TEXT
        self._waiting = ""
        self._depth = 0
        self._is_string = False
        self._is_escaped = False
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
        self._waiting += text
        content: list[str] = []
        calls: list[CallDelta] = []
        while self._step(content, calls):
            pass
        if is_last and self._state is _State.TEXT:
            if not self._must_call:
                content.append(self._waiting)
            self._waiting = ""
        return ParsedPiece("".join(content), tuple(calls))

    def _step(self, content: list[str], calls: list[CallDelta]) -> bool:
        """Read on; whether the state changed, so that there may be more."""
        if self._state is _State.TEXT:
            text, is_found = self._until(self._mark, _State.BEFORE)
            content.append(text)
            return is_found
        if self._state is _State.BEFORE:
            return self._until(_NAME, _State.NAME)[1]
        if self._state is _State.NAME:
            name, found, rest = self._waiting.partition('"')
            if not found:
                return False
            call_id = f"call_{uuid.uuid4().hex[:24]}"
            calls.append(CallDelta(self.num_begun, "", call_id, name))
            self.num_begun += 1
            self._waiting, self._state = rest, _State.GAP
            return True
        if self._state is _State.GAP:
            return self._until(_ARGUMENTS, _State.ARGUMENTS)[1]
        piece, is_end = self._arguments()
        if piece:
            calls.append(CallDelta(self.num_begun - 1, piece))
        if is_end:
            self.num_complete += 1
            self._state = _State.BEFORE
        return is_end

    def _until(self, mark: str, then: _State) -> tuple[str, bool]:
        """Text before ``mark``, which is dropped, or all that cannot begin it; and which it is."""
        before, found, rest = self._waiting.partition(mark)
        if found:
            self._waiting, self._state = rest, then
            return before, True
        kept = next(n for n in range(len(mark) - 1, -1, -1) if before.endswith(mark[:n]))
        self._waiting = before[len(before) - kept :]
        return before[: len(before) - kept], False

    def _arguments(self) -> tuple[str, bool]:
        """The next piece of an object, and whether it ends there."""
        for place, char in enumerate(self._waiting):
            if self._is_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif char == "\\":
                    self._is_escaped = True
                elif char == '"':
                    self._is_string = False
            elif char == '"':
                self._is_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    piece, self._waiting = self._waiting[: place + 1], self._waiting[place + 1 :]
                    return piece, True
        piece, self._waiting = self._waiting, ""
        return piece, False
