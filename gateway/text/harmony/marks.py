"""The marks of the Harmony format, and what the header of a message says.

A message is ``<|start|>HEADER<|message|>TEXT<|end|>``. The last one of an answer ends with
``<|return|>``, a call with ``<|call|>``. A header is a role, a channel and, in a call, a recipient.

Source: "Harmony response format" (OpenAI, 2025), https://github.com/openai/harmony.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


class SpecialToken(str):
    """A special token of the format; the same letters in a plain text are none."""

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
MARKS: tuple[str, ...] = (CHANNEL, MESSAGE, CONSTRAIN, START, *ENDS)
ANALYSIS, COMMENTARY, FINAL = "analysis", "commentary", "final"
CHANNELS = (ANALYSIS, COMMENTARY, FINAL)
"""What the model says to itself; calls, and words for the user before them; its answer."""
ROLE = "assistant"
ROLES = (ROLE, "system", "developer", "user", "tool")
OPENED = f"{START}{ROLE}"
"""How prompts end whose answer begins with a header."""
FUNCTIONS = "functions."
"""Before the name of a function that a message calls."""

_SIGNS = r"[^\w<=\[\]{}()\"'`]{0,64}"
"""White space, and signs such as ``??`` that models write into headers now and then."""
_CHANNEL_NAME = re.compile(rf"{re.escape(CHANNEL)}{_SIGNS}(\w+)")
_RECIPIENT = re.compile(r"\bto=\s*([\w.:/-]+)")
_ROLE_WORD = re.compile(r"[\w.:-]*")
_BEHIND_ROLE = re.compile(rf"{_SIGNS}(?:to=|{re.escape(CHANNEL)}|{re.escape(CONSTRAIN)})")
_ONE_WORD = re.compile(rf"{_SIGNS}[\w.-]{{0,64}}{_SIGNS}")
_TO = rf"\s*(?:{_SIGNS}to=\s*[^\s<]*|to?\Z)?\s*"
_WORDS = re.compile(
    rf"{_TO}(?:{_SIGNS}{re.escape(CHANNEL)}\s*(?:{_SIGNS}(?=\w))?(\w*))?{_TO}"
    rf"(?:{_SIGNS}{re.escape(CONSTRAIN)}\s*\w*)?\s*"
)
"""What a header says behind its role, in the usual order, perhaps cut off; the group: channel."""


class HarmonyPrompt(str):
    """A prompt that tells its marks from texts of clients that look like marks."""

    parts: tuple[str, ...]
    """Marks and texts in their order."""

    def __new__(cls, parts: Iterable[str]) -> HarmonyPrompt:
        whole = tuple(parts)
        made = super().__new__(cls, "".join(whole))
        made.parts = whole
        return made

    @property
    def marks(self) -> frozenset[SpecialToken]:
        """Those that it has."""
        return frozenset(part for part in self.parts if isinstance(part, SpecialToken))


@dataclass(frozen=True, slots=True)
class Header:
    """What a header says."""

    channel: str
    """Empty where it names none."""
    recipient: str
    """Whom the message is for; empty: for the user."""

    @property
    def is_content(self) -> bool:
        """The message is for the user."""
        return not self.recipient and self.channel != ANALYSIS


def read_header(text: str) -> Header:
    """The parts of a header, in any order."""
    channel, recipient = _CHANNEL_NAME.search(text), _RECIPIENT.search(text)
    return Header(channel[1] if channel else "", recipient[1] if recipient else "")


def text_in_header(header: str, has_role: bool, is_whole: bool) -> str:
    """What in ``header`` is no header's word: text of a message whose marks are not all there.

    For example ``<|channel|>analysis I must refuse`` has the text ``I must refuse``. One more word,
    behind a recipient or in a whole header, is the type of the text; signs alone are nothing.

    Args:
        header: up to the mark that ends it.
        has_role: it begins with a role.
        is_whole: that mark is ``<|message|>``.
    """
    place = _role_end(header) if has_role else 0
    while (words := _WORDS.match(header, place)) and words.end() > place:
        if words[1] and not _begins_one_of(CHANNELS, words[1]):
            place = words.start(1)
            break
        place = words.end()
    text = header[place:]
    may_be_type = is_whole or bool(read_header(header).recipient)
    return "" if may_be_type and _ONE_WORD.fullmatch(text.strip()) else text


def _role_end(header: str) -> int:
    word = _ROLE_WORD.match(header)
    assert word is not None, "it matches an empty text"
    is_role = _begins_one_of(ROLES, word[0]) or _BEHIND_ROLE.match(header, word.end())
    return word.end() if is_role else 0


def _begins_one_of(names: tuple[str, ...], text: str) -> bool:
    return any(name.startswith(text) for name in names)


def without_signs(text: str) -> str:
    """A text without white space and signs at its start."""
    return re.sub(_SIGNS, "", text.lstrip(), count=1)


def open_message(prompt: str) -> str:
    """The header of the message that a prompt leaves open, from ``<|start|>`` on.

    It ends with ``<|message|>`` where an answer goes on with the message's text; it is empty where
    no message is open.
    """
    place = prompt.rfind(START)
    if place < 0 or any(prompt.find(end, place) >= 0 for end in ENDS):
        return ""
    header, mark, _ = prompt[place:].partition(MESSAGE)
    return header + mark


def open_header(ids: Sequence[int], special_ids: Mapping[str, int]) -> Sequence[int]:
    """The same of a prompt's tokens, where marks are tokens and texts that look like them are not.

    Args:
        ids: the prompt.
        special_ids: special tokens by text, the marks among them.
    """
    ends = {special_ids[end] for end in ENDS}
    place = len(ids) - 1
    while place >= 0 and ids[place] != special_ids[START]:
        if ids[place] in ends:
            return ()
        place -= 1
    header = ids[place:] if place >= 0 else ()
    message = special_ids[MESSAGE]
    return header[: header.index(message) + 1] if message in header else header
