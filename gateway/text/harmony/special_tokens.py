"""The special tokens of the Harmony format, and the headers of messages.

A message is ``<|start|>HEADER<|message|>TEXT<|end|>``. The last message of an answer ends with
``<|return|>``, a call with ``<|call|>``. A header consists of a role, a channel and, in calls, a
recipient.

Source: "Harmony response format" (OpenAI, 2025), https://github.com/openai/harmony.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


class SpecialToken(str):
    """A special token of the Harmony format; equal characters in a plain text are not a token."""

    __slots__ = ()


CHANNEL, MESSAGE, CONSTRAIN = (
    SpecialToken("<|channel|>"),
    SpecialToken("<|message|>"),
    SpecialToken("<|constrain|>"),
)
START, END, RETURN, CALL = (
    SpecialToken("<|start|>"),
    SpecialToken("<|end|>"),
    SpecialToken("<|return|>"),
    SpecialToken("<|call|>"),
)
ENDS: tuple[str, ...] = (END, RETURN, CALL)
SPECIAL_TOKENS: tuple[str, ...] = (CHANNEL, MESSAGE, CONSTRAIN, START, *ENDS)
ANALYSIS, COMMENTARY, FINAL = "analysis", "commentary", "final"
CHANNELS = (ANALYSIS, COMMENTARY, FINAL)
"""Message channels: for reasoning; for calls and text to the user before calls; for the answer."""
ROLE = "assistant"
ROLES = (ROLE, "system", "developer", "user", "tool")
OPENED = f"{START}{ROLE}"
"""End of a Harmony prompt after which the answer begins with the rest of a message header."""
FUNCTIONS = "functions."
"""Prefix of the name of a called function in a message header."""

_SIGNS = r"[^\w<=\[\]{}()\"'`]{0,64}"
"""Pattern of white space, and of characters such as ``??`` that models write into headers."""
_CHANNEL_NAME = re.compile(rf"{re.escape(CHANNEL)}{_SIGNS}(\w+)")
_RECIPIENT = re.compile(r"\bto=\s*([\w.:/-]+)")
_ROLE_WORD = re.compile(r"[\w.:-]*")
_AFTER_ROLE = re.compile(rf"{_SIGNS}(?:to=|{re.escape(CHANNEL)}|{re.escape(CONSTRAIN)})")
_ONE_WORD = re.compile(rf"{_SIGNS}[\w.-]{{0,64}}{_SIGNS}")
_TO = rf"\s*(?:{_SIGNS}to=\s*[^\s<]*|to?\Z)?\s*"
_WORDS = re.compile(
    rf"{_TO}(?:{_SIGNS}{re.escape(CHANNEL)}\s*(?:{_SIGNS}(?=\w))?(\w*))?{_TO}"
    rf"(?:{_SIGNS}{re.escape(CONSTRAIN)}\s*\w*)?\s*"
)
"""Pattern of a message header after its role, possibly incomplete. The group is the channel."""


class HarmonyPrompt(str):
    """A Harmony prompt that distinguishes special tokens from client texts that look like them."""

    parts: tuple[str, ...]
    """Parts of the prompt in order: special tokens (``SpecialToken``) and texts (``str``)."""

    def __new__(cls, parts: Iterable[str]) -> HarmonyPrompt:
        whole = tuple(parts)
        made = super().__new__(cls, "".join(whole))
        made.parts = whole
        return made

    @property
    def special_tokens(self) -> frozenset[SpecialToken]:
        return frozenset(part for part in self.parts if isinstance(part, SpecialToken))


@dataclass(frozen=True, slots=True)
class MessageHeader:
    """The parsed header of a message in the Harmony format."""

    channel: str
    """Name of the message's channel; empty if the header has no channel."""
    recipient: str
    """Recipient of the message, for example a function; empty for the user."""

    @property
    def is_content(self) -> bool:
        """Whether the message is text for the user."""
        return not self.recipient and self.channel != ANALYSIS


def read_header(text: str) -> MessageHeader:
    """Parse the header of a Harmony message; the parts of the header may be in any order."""
    channel, recipient = _CHANNEL_NAME.search(text), _RECIPIENT.search(text)
    return MessageHeader(channel[1] if channel else "", recipient[1] if recipient else "")


def text_in_header(header: str, has_role: bool, is_whole: bool) -> str:
    """Return the message text in ``header``, for messages that lack some of their special tokens.

    For example ``<|channel|>analysis I must refuse`` has the text ``I must refuse``. A single word
    after a recipient or in a complete header is the type of the text, not text. Empty without text.

    Args:
        header: the header up to the special token that ends it.
        has_role: whether the header begins with a role.
        is_whole: whether ``<|message|>`` ends the header.
    """
    position = _role_end(header) if has_role else 0
    while (match := _WORDS.match(header, position)) and match.end() > position:
        if match[1] and not _begins_one_of(CHANNELS, match[1]):
            position = match.start(1)
            break
        position = match.end()
    text = header[position:]
    may_be_type = is_whole or bool(read_header(header).recipient)
    return "" if may_be_type and _ONE_WORD.fullmatch(text.strip()) else text


def _role_end(header: str) -> int:
    word = _ROLE_WORD.match(header)
    assert word is not None, "it matches an empty text"
    is_role = _begins_one_of(ROLES, word[0]) or _AFTER_ROLE.match(header, word.end())
    return word.end() if is_role else 0


def _begins_one_of(names: tuple[str, ...], text: str) -> bool:
    return any(name.startswith(text) for name in names)


def strip_signs(text: str) -> str:
    """Return a text without white space and signs such as ``??`` at its start."""
    return re.sub(_SIGNS, "", text.lstrip(), count=1)


def open_message(prompt: str) -> str:
    """Return the header of the open message at the end of a prompt, including ``<|start|>``.

    The result ends with ``<|message|>`` if the answer continues the text of this message, and is
    empty if the prompt has no open message.
    """
    position = prompt.rfind(START)
    if position < 0 or any(prompt.find(end, position) >= 0 for end in ENDS):
        return ""
    header, token, _ = prompt[position:].partition(MESSAGE)
    return header + token


def open_header(ids: Sequence[int], special_ids: Mapping[str, int]) -> Sequence[int]:
    """Return the token ids of the header of the open message at the end of a prompt.

    The result includes ``<|start|>`` and, if present, ``<|message|>``; it is empty if no message is
    open. Texts that look like special tokens are ignored.

    Args:
        ids: the token ids of the prompt.
        special_ids: ids of the special tokens by text, including ``SPECIAL_TOKENS``.
    """
    ends = {special_ids[end] for end in ENDS}
    position = len(ids) - 1
    while position >= 0 and ids[position] != special_ids[START]:
        if ids[position] in ends:
            return ()
        position -= 1
    header = ids[position:] if position >= 0 else ()
    message = special_ids[MESSAGE]
    return header[: header.index(message) + 1] if message in header else header
