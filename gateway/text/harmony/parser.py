"""Incremental parser that splits an answer in the Harmony format into content, reasoning and calls.

An answer is a sequence of messages, ``<|channel|>NAME<|message|>TEXT<|end|><|start|>assistant``;
the last one ends with ``<|return|>`` or ``<|call|>``. Text on the channel ``analysis`` is
reasoning; a message to an offered function is a call; any other text for the user is content.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from enum import Enum, auto

from gateway.text.harmony.special_tokens import (
    CHANNEL,
    CONSTRAIN,
    ENDS,
    FUNCTIONS,
    MESSAGE,
    OPENED,
    ROLE,
    SPECIAL_TOKENS,
    START,
    MessageHeader,
    read_header,
    strip_signs,
    text_in_header,
)
from gateway.text.tool_formats.call_ids import CallIdGenerator
from gateway.text.tool_formats.delimiters import (
    partial_delimiter_length,
    resolve_partial_name,
    split_at_delimiter,
)
from gateway.text.tool_formats.tool_calls import CallDelta, ParsedPiece, PieceBuilder

MAX_HEADER_CHARS = 256
"""Maximum length of a message header in characters. A longer header counts as text, so that clients
do not wait for the end of the header."""
_PIECE_CHARS = 4096
"""Number of characters parsed at a time, so that the work is linear in the length of the text."""
_TEXT_ENDS = (*ENDS, START)
_HEADER_ENDS = (MESSAGE, *_TEXT_ENDS)
_WINDOW_CHARS = MAX_HEADER_CHARS + max(map(len, _HEADER_ENDS))
_FIRST_WORDS = (*SPECIAL_TOKENS, "to=")
"""Texts that may follow the role in a message header."""


class _HarmonyState(Enum):
    BETWEEN = auto()
    HEADER = auto()
    REASONING = auto()
    CONTENT = auto()
    ARGUMENTS = auto()


def _text_state(header: MessageHeader) -> _HarmonyState:
    return _HarmonyState.CONTENT if header.is_content else _HarmonyState.REASONING


class HarmonyParser:
    """Parses one answer in the Harmony format into reasoning, content and calls, piece by piece.

    The result does not depend on how the text is split into pieces.

    ``<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>final<|message|>Yes.``
    is the reasoning ``Look.`` and the content ``Yes.`` No text is lost, except words of a header:
    text outside of messages is content, and so is an answer without special tokens.

    Args:
        names: functions that may be called. A message to any other function is reasoning.
        opened: header of the message that the prompt leaves open and the answer continues.
    """

    def __init__(self, names: Collection[str] = (), opened: str = OPENED) -> None:
        self._names = frozenset(names)
        self._ids = CallIdGenerator()
        self._waiting = opened.removeprefix(OPENED).removeprefix(START)
        self._state = _HarmonyState.HEADER if opened else _HarmonyState.BETWEEN
        self._has_role = not opened.startswith(OPENED)
        """Whether the current header begins with a role."""
        self._may_be_text = opened == OPENED
        """Whether the answer may begin with text instead of a header."""
        self._arguments: list[str] = []
        self.num_begun = 0
        """Number of tool calls in the answer whose function name is known."""
        self.num_complete = 0
        """Number of tool calls in the answer with complete arguments."""
        if opened.endswith(MESSAGE):
            self._waiting = ""
            self._state = _text_state(read_header(opened))

    @property
    def has_calls(self) -> bool:
        """Whether the answer has tool calls and all of them are complete."""
        return 0 < self.num_complete == self.num_begun

    def feed(self, text: str, is_last: bool = False, ends_with_token: bool = False) -> ParsedPiece:
        """Add the next piece of the answer and return the parsed output that is final.

        Args:
            text: the next piece.
            is_last: whether the answer ends with ``text``; if so, no text is held back.
            ends_with_token: whether a special token, which is not in the text, ended the answer.
        """
        output = PieceBuilder()
        for start in range(0, max(len(text), 1), _PIECE_CHARS):
            piece = text[start : start + _PIECE_CHARS]
            self._read(piece, output, is_last and start + len(piece) == len(text))
        if is_last and self._state is _HarmonyState.ARGUMENTS:
            self._end_call(output, ends_with_token)
            self._state = _HarmonyState.BETWEEN
        return output.build()

    def _read(self, piece: str, output: PieceBuilder, is_last: bool) -> None:
        self._waiting += piece
        while self._step(output, is_last):
            pass

    def _step(self, output: PieceBuilder, is_last: bool) -> bool:
        """Parse the next part of the waiting text; return whether another step may parse more."""
        if self._state is _HarmonyState.BETWEEN:
            return self._read_between(is_last)
        if self._state is _HarmonyState.HEADER:
            return self._read_header(output, is_last)
        return self._read_text(output, is_last)

    def _read_between(self, is_last: bool) -> bool:
        """Read up to the next header, or up to text without a header."""
        text = self._waiting
        if token := next((token for token in _TEXT_ENDS if text.startswith(token)), ""):
            self._waiting = text[len(token) :]
            if token == START:
                self._expect_header(has_role=True)
            return True
        after_role = text[:MAX_HEADER_CHARS].removeprefix(ROLE)
        if _is_header_start(after_role):
            self._expect_header(has_role=text.startswith(ROLE))
            return True
        may_become_header = ROLE.startswith(text) or _may_become_header(after_role)
        if not text or (may_become_header and not is_last and len(text) <= MAX_HEADER_CHARS):
            return False
        self._state = _HarmonyState.CONTENT
        return True

    def _expect_header(self, has_role: bool) -> None:
        self._state, self._has_role, self._may_be_text = _HarmonyState.HEADER, has_role, False

    def _read_header(self, output: PieceBuilder, is_last: bool) -> bool:
        """Read up to the text of a message."""
        if self._may_be_text and not _may_become_header(self._waiting):
            self._state = _HarmonyState.CONTENT
            return True
        window = self._waiting[:_WINDOW_CHARS]
        header, token, _ = split_at_delimiter(window, _HEADER_ENDS)
        if not token and not is_last and len(window) < _WINDOW_CHARS:
            return False
        if not token:
            header = window[:MAX_HEADER_CHARS]
        self._waiting = self._waiting[len(header) + len(token) :]
        state = self._add_header_text(header, token == MESSAGE, output)
        self._state = _HarmonyState.BETWEEN if token else state
        if token == START:
            self._expect_header(has_role=True)
        elif token == MESSAGE:
            self._begin(read_header(header), output)
        elif not token and is_last and not self._waiting:
            self._begin_incomplete(header, output)
        return True

    def _begin(self, header: MessageHeader, output: PieceBuilder) -> None:
        name = header.recipient.removeprefix(FUNCTIONS)
        if name != header.recipient and name in self._names:
            self._begin_call(name, output)
            self._state = _HarmonyState.ARGUMENTS
        else:
            self._state = _text_state(header)

    def _begin_incomplete(self, header: str, output: PieceBuilder) -> None:
        """Begin a call whose header the end of the answer cuts off, if its function is known."""
        recipient = read_header(header).recipient
        begun = recipient.removeprefix(FUNCTIONS)
        name = resolve_partial_name(begun, header, self._names) if begun != recipient else ""
        if name and not text_in_header(header, self._has_role, False):
            self._begin_call(name, output)

    def _begin_call(self, name: str, output: PieceBuilder) -> None:
        output.add_call(CallDelta(self.num_begun, "", self._ids.new(name), name))
        self.num_begun += 1
        self._arguments = []

    def _add_header_text(self, header: str, is_whole: bool, output: PieceBuilder) -> _HarmonyState:
        """Add the message text in a header to ``output``; return the parser state for this text."""
        has_tokens = is_whole or CHANNEL in header or CONSTRAIN in header
        is_text = self._may_be_text and not has_tokens
        text = header if is_text else text_in_header(header, self._has_role, is_whole)
        state = _HarmonyState.CONTENT if is_text else _text_state(read_header(header))
        output.add_text(text, is_reasoning=state is not _HarmonyState.CONTENT)
        return state

    def _read_text(self, output: PieceBuilder, is_last: bool) -> bool:
        """Read the text of a message that is certain so far; return whether the message ends."""
        text, token, rest = split_at_delimiter(self._waiting, _TEXT_ENDS)
        if not token and not is_last and (kept := partial_delimiter_length(text, _TEXT_ENDS)):
            text, rest = text[:-kept], text[-kept:]
        self._waiting = rest
        if text:
            self._add_text(text, output)
        if token:
            if self._state is _HarmonyState.ARGUMENTS:
                self._end_call(output, has_token=token != START)
            self._state = _HarmonyState.BETWEEN
        if token == START:
            self._expect_header(has_role=True)
        return bool(token)

    def _end_call(self, output: PieceBuilder, has_token: bool) -> None:
        """End a call. It is complete if its end token is present or its arguments are complete."""
        if has_token and not "".join(self._arguments).strip():
            self._add_text("{}", output)
        self.num_complete += has_token or _is_object("".join(self._arguments))

    def _add_text(self, text: str, output: PieceBuilder) -> None:
        if self._state is _HarmonyState.ARGUMENTS:
            self._arguments.append(text)
            output.add_call(CallDelta(self.num_begun - 1, text))
        else:
            output.add_text(text, is_reasoning=self._state is _HarmonyState.REASONING)


def _is_header_start(text: str) -> bool:
    """Whether a text begins like the part of a header after its role."""
    return text.lstrip().startswith(_FIRST_WORDS)


def _may_become_header(text: str) -> bool:
    """Whether a text, or its continuation, may begin the part of a header after its role."""
    stripped = strip_signs(text)
    return any(stripped.startswith(first) or first.startswith(stripped) for first in _FIRST_WORDS)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
