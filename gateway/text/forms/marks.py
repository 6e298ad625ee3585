"""Find delimiters in texts that arrive in pieces."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cache

from gateway.text.forms.call_syntax import Part, Slot

_PATTERNS = {
    Slot.NAME: re.compile(r"[A-Za-z0-9_.-]*"),
    Slot.NUMBER: re.compile(r"[0-9]*"),
}
_TRUTHS = ("true", "false")


def cut(text: str, marks: Sequence[str]) -> tuple[str, str, str]:
    """Split a text at the first delimiter: text before it, delimiter (or empty), rest."""
    places = [(place, mark) for mark in marks if (place := text.find(mark)) >= 0]
    if not places:
        return text, "", ""
    place, mark = min(places)
    return text[:place], mark, text[place + len(mark) :]


def overlap(text: str, marks: Sequence[str]) -> int:
    """Return the number of characters at the end of a text that may begin a delimiter."""
    most = max(map(len, marks), default=1) - 1
    sizes = range(min(most, len(text)), 0, -1)
    return next((n for n in sizes if any(mark.startswith(text[-n:]) for mark in marks)), 0)


def may_begin(text: str, marks: Sequence[str]) -> bool:
    """Whether a text is a proper prefix of a delimiter."""
    return any(len(text) < len(mark) and mark.startswith(text) for mark in marks)


def name_of_cut(begun: str, text: str, names: Collection[str]) -> str:
    """Return the function in a head that the end of the answer cuts; empty if it is ambiguous.

    Args:
        begun: the name of the function or its beginning.
        text: the head so far.
        names: names of the functions.
    """
    if begun in names and not text.endswith(begun):
        return begun
    fitting = [name for name in names if name.startswith(begun)]
    return fitting[0] if len(fitting) == 1 else ""


class Outcome(Enum):
    WHOLE = auto()
    PARTIAL = auto()
    """The text ends before the parts are complete."""
    BROKEN = auto()
    """The text does not match."""


@dataclass(slots=True)
class Reading:
    """Result of matching the beginning of a text with parts of a call."""

    outcome: Outcome
    end: int
    """Number of characters that complete parts matched."""
    slots: dict[Slot, str] = field(default_factory=dict)
    """Text of each variable part; the last one may be incomplete."""


def read_parts(parts: Sequence[Part], text: str) -> Reading:
    """Match the beginning of a text with parts of a call, ignoring white space.

    For example ``("<f=", NAME, ">")`` and ``"<f=now> x"`` give ``WHOLE``, 7, ``NAME: "now"``.
    """
    reading = Reading(Outcome.WHOLE, 0)
    for number, part in enumerate(parts):
        following = parts[number + 1] if number + 1 < len(parts) else ""
        outcome, end = _read_part(part, following, text, reading)
        if outcome is not Outcome.WHOLE:
            reading.outcome = outcome
            return reading
        reading.end = end
    return reading


def _read_part(part: Part, following: Part, text: str, reading: Reading) -> tuple[Outcome, int]:
    place = reading.end
    if part is Slot.BREAK:
        return Outcome.WHOLE, place
    if isinstance(part, str):
        return _read_literal(_bare(part), text, place)
    if part is Slot.KEY:
        assert isinstance(following, str), "a text ends the name of an argument"
        return _read_key(following.split()[0], text, reading)
    place = _skip_space(text, place)
    if part is Slot.IS_TEXT:
        found = next((word for word in _TRUTHS if text.startswith(word, place)), "")
        is_cut = may_begin(text[place:], _TRUTHS)
        reading.slots[part] = found
        outcome = Outcome.PARTIAL if is_cut else Outcome.WHOLE if found else Outcome.BROKEN
        return outcome, place + len(found)
    matched = _PATTERNS[part].match(text, place)
    assert matched is not None, "it matches an empty text"
    reading.slots[part] = matched[0]
    if matched.end() == len(text):
        return Outcome.PARTIAL, place
    return (Outcome.WHOLE if matched[0] else Outcome.BROKEN), matched.end()


def _read_literal(literal: str, text: str, place: int) -> tuple[Outcome, int]:
    for char in literal:
        place = _skip_space(text, place)
        if place == len(text):
            return Outcome.PARTIAL, place
        if text[place] != char:
            return Outcome.BROKEN, place
        place += 1
    return Outcome.WHOLE, place


def _read_key(end: str, text: str, reading: Reading) -> tuple[Outcome, int]:
    key, found, _ = text[reading.end :].partition(end)
    reading.slots[Slot.KEY] = key.strip()
    return (Outcome.WHOLE if found else Outcome.PARTIAL), reading.end + len(key)


def _skip_space(text: str, place: int) -> int:
    while place < len(text) and text[place].isspace():
        place += 1
    return place


@cache
def _bare(literal: str) -> str:
    """Return a text without white space."""
    return "".join(literal.split())
