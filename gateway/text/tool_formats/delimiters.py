"""Finds delimiters in texts that arrive in pieces."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import cache

from gateway.text.tool_formats.call_syntax import Part, Placeholder

_PATTERNS = {
    Placeholder.NAME: re.compile(r"[A-Za-z0-9_.-]*"),
    Placeholder.NUMBER: re.compile(r"[0-9]*"),
}
_TRUTHS = ("true", "false")


def split_at_delimiter(text: str, delimiters: Sequence[str]) -> tuple[str, str, str]:
    """Split a text at the first delimiter: text before it, delimiter (or empty), rest."""
    candidates = [
        (position, delimiter) for delimiter in delimiters if (position := text.find(delimiter)) >= 0
    ]
    if not candidates:
        return text, "", ""
    position, delimiter = min(candidates)
    return text[:position], delimiter, text[position + len(delimiter) :]


def partial_delimiter_length(text: str, delimiters: Sequence[str]) -> int:
    """Return the number of characters at the end of a text that may begin a delimiter."""
    max_length = max(map(len, delimiters), default=1) - 1
    sizes = range(min(max_length, len(text)), 0, -1)
    return next(
        (n for n in sizes if any(delimiter.startswith(text[-n:]) for delimiter in delimiters)), 0
    )


def is_delimiter_prefix(text: str, delimiters: Sequence[str]) -> bool:
    """Whether a text is a proper prefix of a delimiter."""
    return any(
        len(text) < len(delimiter) and delimiter.startswith(text) for delimiter in delimiters
    )


def resolve_partial_name(partial_name: str, text: str, names: Collection[str]) -> str:
    """Return the function that an incomplete tool call at the end of an answer names.

    The result is empty if no function or several functions fit.

    Args:
        partial_name: the name of the function or its beginning.
        text: the beginning of the call so far.
        names: names of the functions.
    """
    if partial_name in names and not text.endswith(partial_name):
        return partial_name
    fitting = [name for name in names if name.startswith(partial_name)]
    return fitting[0] if len(fitting) == 1 else ""


class MatchOutcome(Enum):
    WHOLE = auto()
    PARTIAL = auto()
    """The text ends before all parts are matched."""
    BROKEN = auto()
    """The text does not match the parts."""


@dataclass(slots=True)
class TemplateMatch:
    """Result of matching the beginning of a text with the syntax parts of a tool call."""

    outcome: MatchOutcome
    end: int
    """Number of characters of the text up to the end of the last complete part."""
    values: dict[Placeholder, str] = field(default_factory=dict)
    """Text of each variable part. The text of the last variable part may be incomplete."""


def match_parts(parts: Sequence[Part], text: str) -> TemplateMatch:
    """Match the beginning of a text with the syntax parts of a tool call, ignoring white space.

    For example ``("<f=", NAME, ">")`` and ``"<f=now> x"`` give ``WHOLE``, 7, ``NAME: "now"``.
    """
    reading = TemplateMatch(MatchOutcome.WHOLE, 0)
    for number, part in enumerate(parts):
        following = parts[number + 1] if number + 1 < len(parts) else ""
        outcome, end = _match_part(part, following, text, reading)
        if outcome is not MatchOutcome.WHOLE:
            reading.outcome = outcome
            return reading
        reading.end = end
    return reading


def _match_part(
    part: Part, following: Part, text: str, reading: TemplateMatch
) -> tuple[MatchOutcome, int]:
    position = reading.end
    if part is Placeholder.BREAK:
        return MatchOutcome.WHOLE, position
    if isinstance(part, str):
        return _match_literal(_strip_spaces(part), text, position)
    if part is Placeholder.KEY:
        assert isinstance(following, str), "a text ends the name of an argument"
        return _match_key(following.split()[0], text, reading)
    position = _skip_space(text, position)
    if part is Placeholder.IS_TEXT:
        truth = next((word for word in _TRUTHS if text.startswith(word, position)), "")
        is_cut = is_delimiter_prefix(text[position:], _TRUTHS)
        reading.values[part] = truth
        outcome = (
            MatchOutcome.PARTIAL if is_cut else MatchOutcome.WHOLE if truth else MatchOutcome.BROKEN
        )
        return outcome, position + len(truth)
    matched = _PATTERNS[part].match(text, position)
    assert matched is not None, "it matches an empty text"
    reading.values[part] = matched[0]
    if matched.end() == len(text):
        return MatchOutcome.PARTIAL, position
    return (MatchOutcome.WHOLE if matched[0] else MatchOutcome.BROKEN), matched.end()


def _match_literal(literal: str, text: str, position: int) -> tuple[MatchOutcome, int]:
    for char in literal:
        position = _skip_space(text, position)
        if position == len(text):
            return MatchOutcome.PARTIAL, position
        if text[position] != char:
            return MatchOutcome.BROKEN, position
        position += 1
    return MatchOutcome.WHOLE, position


def _match_key(end: str, text: str, reading: TemplateMatch) -> tuple[MatchOutcome, int]:
    key, delimiter, _ = text[reading.end :].partition(end)
    reading.values[Placeholder.KEY] = key.strip()
    return (MatchOutcome.WHOLE if delimiter else MatchOutcome.PARTIAL), reading.end + len(key)


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


@cache
def _strip_spaces(literal: str) -> str:
    """Return a text without white space."""
    return "".join(literal.split())
