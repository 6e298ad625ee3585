"""Parsed pieces of an answer: content, reasoning and tool calls."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import groupby


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of one tool call. The arguments of a call are the concatenation of its pieces."""

    index: int
    """Index of the call in the answer."""
    arguments: str
    """A piece of the JSON text of the call's arguments; may be empty."""
    call_id: str | None = None
    """Id of the call in its first piece, else None."""
    name: str | None = None
    """Name of the function in the first piece of a call, else None."""


@dataclass(frozen=True, slots=True)
class ParsedText:
    """A piece of an answer's text: reasoning or content."""

    text: str
    is_reasoning: bool = False


@dataclass(frozen=True, slots=True)
class ParsedPiece:
    """The parsed output for a piece of an answer: content, tool calls and reasoning."""

    content: str
    calls: tuple[CallDelta, ...] = ()
    reasoning: str = ""
    """Reasoning text, if the format of the model separates it."""
    parts: tuple[ParsedText | CallDelta, ...] = field(default=(), compare=False)
    """All parts in the order of the answer; may be empty if all parts are of one kind."""

    def merge_calls(self) -> ParsedPiece:
        """Return a copy with the pieces of each call in ``calls`` merged into one piece.

        Clients would read several pieces as several calls.
        """
        calls: list[CallDelta] = []
        for _, pieces in groupby(self.calls, key=lambda call: call.index):
            first, *rest = pieces
            arguments = "".join(piece.arguments for piece in (first, *rest))
            calls.append(replace(first, arguments=arguments))
        return replace(self, calls=tuple(calls))

    def ordered_parts(self) -> tuple[ParsedText | CallDelta, ...]:
        """Return the parts in the order in which the model wrote them."""
        if self.parts:
            return self.parts
        texts = (ParsedText(self.reasoning, True), ParsedText(self.content))
        return (*(text for text in texts if text.text), *self.calls)


class PieceBuilder:
    """Builds a ``ParsedPiece`` from its parts in order."""

    def __init__(self) -> None:
        self._parts: list[ParsedText | CallDelta] = []

    def add_text(self, text: str, is_reasoning: bool = False) -> None:
        if text:
            self._parts.append(ParsedText(text, is_reasoning))

    def add_call(self, call: CallDelta) -> None:
        self._parts.append(call)

    def build(self) -> ParsedPiece:
        texts = [part for part in self._parts if isinstance(part, ParsedText)]
        calls = tuple(part for part in self._parts if isinstance(part, CallDelta))
        content = "".join(part.text for part in texts if not part.is_reasoning)
        reasoning = "".join(part.text for part in texts if part.is_reasoning)
        return ParsedPiece(content, calls, reasoning, tuple(self._parts))
