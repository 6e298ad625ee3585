"""From an answer in the Harmony format to what the client gets of it, as the text comes in.

An answer is a row of messages, ``<|channel|>NAME<|message|>TEXT<|end|><|start|>assistant``, and the
last one ends with ``<|return|>`` or ``<|call|>``. Channels are ``analysis`` (what the model says to
itself), ``final`` (its answer) and ``commentary``: a call where the header names a recipient, else
words for the user before calls. The prompt ends behind the first ``<|start|>assistant``.

Source: "Harmony response format" (OpenAI, 2025), https://github.com/openai/harmony.
"""

from __future__ import annotations

import re
import uuid
from enum import Enum, auto

from gateway.text.tool_calls import CallDelta, ParsedPiece

CHANNEL, MESSAGE, CONSTRAIN = "<|channel|>", "<|message|>", "<|constrain|>"
START, END, RETURN, CALL = "<|start|>", "<|end|>", "<|return|>", "<|call|>"
FUNCTIONS = "functions."
_ENDS = (END, RETURN, CALL, START)
_HEADERS = (CHANNEL, MESSAGE, START, CONSTRAIN, " to=", "assistant")
"""How a header can begin; an answer that begins otherwise has no messages."""
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_CHANNEL_NAME = re.compile(re.escape(CHANNEL) + r"\s*(\w+)")


class _Kind(Enum):
    REASONING = auto()
    CONTENT = auto()
    ARGUMENTS = auto()


class HarmonyParser:
    """Reads one answer. The result does not depend on how the text was cut into pieces.

    ``<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>final<|message|>Yes.``
    is the reasoning ``Look.`` and the content ``Yes.``
    """

    def __init__(self) -> None:
        self._waiting = ""
        self._kind: _Kind | None = None
        """Of the message whose text comes; None: in a header."""
        self._num_messages = 0
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
        found = _Found()
        while self._step(found, is_last):
            pass
        if is_last and self._kind is _Kind.ARGUMENTS:
            self.num_complete += 1  # the mark at its end is where the model stops
            self._kind = None
        return found.piece()

    def _step(self, found: _Found, is_last: bool) -> bool:
        """Read on; whether there may be more."""
        if self._kind is None:
            return self._header(found, is_last)
        text, is_end = self._body(is_last)
        if text:
            self._take(text, found)
        if is_end:
            self.num_complete += self._kind is _Kind.ARGUMENTS
            self._kind = None
        return is_end

    def _header(self, found: _Found, is_last: bool) -> bool:
        """Up to the text of a message."""
        if not self._num_messages and not _may_begin(self._waiting):
            self._num_messages, self._kind = 1, _Kind.CONTENT
            return True
        header, mark, rest = self._waiting.partition(MESSAGE)
        if not mark:
            if is_last:
                self._waiting = ""
            return False
        self._waiting = rest
        self._num_messages += 1
        channel = _CHANNEL_NAME.search(header)
        recipient = _RECIPIENT.search(header)
        name = recipient[1].split(CHANNEL)[0].split(CONSTRAIN)[0] if recipient else ""
        if name.startswith(FUNCTIONS):
            self._kind = _Kind.ARGUMENTS
            call_id = f"call_{uuid.uuid4().hex[:24]}"
            found.calls.append(CallDelta(self.num_begun, "", call_id, name[len(FUNCTIONS) :]))
            self.num_begun += 1
        elif name or (channel is not None and channel[1] == "analysis"):
            self._kind = _Kind.REASONING  # also what it would say to tools that it was not given
        else:
            self._kind = _Kind.CONTENT
        return True

    def _body(self, is_last: bool) -> tuple[str, bool]:
        """Text of the message that is certain, and whether the message ends there."""
        places = [(place, end) for end in _ENDS if (place := self._waiting.find(end)) >= 0]
        if places:
            place, end = min(places)
            text, self._waiting = self._waiting[:place], self._waiting[place + len(end) :]
            return text, True
        kept = 0 if is_last else _overlap(self._waiting)
        cut = len(self._waiting) - kept
        text, self._waiting = self._waiting[:cut], self._waiting[cut:]
        return text, False

    def _take(self, text: str, found: _Found) -> None:
        match self._kind:
            case _Kind.REASONING:
                found.reasoning.append(text)
            case _Kind.ARGUMENTS:
                found.calls.append(CallDelta(self.num_begun - 1, text))
            case _:
                found.content.append(text)


class _Found:
    """What one piece of text turned out to be."""

    def __init__(self) -> None:
        self.content: list[str] = []
        self.reasoning: list[str] = []
        self.calls: list[CallDelta] = []

    def piece(self) -> ParsedPiece:
        content, reasoning = "".join(self.content), "".join(self.reasoning)
        return ParsedPiece(content, tuple(self.calls), reasoning)


def _may_begin(text: str) -> bool:
    """Whether an answer that begins so may have messages."""
    return any(text.startswith(header) or header.startswith(text) for header in _HEADERS)


def _overlap(text: str) -> int:
    """Characters at the end of a text that may begin a mark."""
    most = max(map(len, _ENDS)) - 1
    sizes = range(min(most, len(text)), 0, -1)
    return next((n for n in sizes if any(end.startswith(text[-n:]) for end in _ENDS)), 0)
