"""What a piece of an answer turns out to be: words for the user, reasoning, calls of functions."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import groupby


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
class ParsedText:
    """A piece of text."""

    text: str
    is_reasoning: bool = False


@dataclass(frozen=True, slots=True)
class ParsedPiece:
    """What a piece of text turned out to be."""

    content: str
    calls: tuple[CallDelta, ...] = ()
    reasoning: str = ""
    """What the model says to itself, where its form tells that apart."""
    parts: tuple[ParsedText | CallDelta, ...] = field(default=(), compare=False)
    """The same in the order of the answer; empty where there is but one kind."""

    def joined(self) -> ParsedPiece:
        """The same with one piece for each call: of several, clients make several calls."""
        calls: list[CallDelta] = []
        for _, pieces in groupby(self.calls, key=lambda call: call.index):
            first, *rest = pieces
            arguments = "".join(piece.arguments for piece in (first, *rest))
            calls.append(replace(first, arguments=arguments))
        return replace(self, calls=tuple(calls))

    def in_order(self) -> tuple[ParsedText | CallDelta, ...]:
        """Its parts as the model wrote them."""
        if self.parts:
            return self.parts
        texts = (ParsedText(self.reasoning, True), ParsedText(self.content))
        return (*(text for text in texts if text.text), *self.calls)


class PieceBuilder:
    """Puts a piece together, in the order in which its parts are found."""

    def __init__(self) -> None:
        self._parts: list[ParsedText | CallDelta] = []

    def add_text(self, text: str, is_reasoning: bool = False) -> None:
        if text:
            self._parts.append(ParsedText(text, is_reasoning))

    def add_call(self, call: CallDelta) -> None:
        self._parts.append(call)

    def piece(self) -> ParsedPiece:
        texts = [part for part in self._parts if isinstance(part, ParsedText)]
        calls = tuple(part for part in self._parts if isinstance(part, CallDelta))
        content = "".join(part.text for part in texts if not part.is_reasoning)
        reasoning = "".join(part.text for part in texts if part.is_reasoning)
        return ParsedPiece(content, calls, reasoning, tuple(self._parts))
