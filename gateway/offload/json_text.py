"""Parses JSON text from clients without blocking other threads for long.

A compiled parser holds the GIL. Therefore the parts of a text are counted first, in pieces, and a
text that takes longer than some milliseconds to parse is rejected. Numbers, of which prompts have
many, are converted by Python calls, between which other threads can run.
"""

from __future__ import annotations

import json
import math
from typing import Any

from gateway.core.field_checks import check_length
from gateway.offload.long_work import GC_PAUSE

MAX_NAMES = 65_536
"""Maximum total number of names in all objects of a text."""
MAX_VALUES = 131_072
"""Maximum total number of strings (including names), lists and objects of a text."""
MAX_ENTRIES = 1_048_576
"""Maximum total number of entries of all lists and objects. As it exceeds ``MAX_VALUES``, most of
that many entries must be numbers."""
MAX_ESCAPES = 2_097_152
"""Maximum total number of escapes in all strings of a text. It exceeds the number of escaped
non-ASCII characters that fit in a body."""
_SHORT_CHARS = 16_384
"""Length below which a text is parsed without counting."""
_PIECE_CHARS = 65_536


def load_json(text: str, name: str) -> Any:
    """Parse a JSON text.

    Args:
        text: the text.
        name: name of the field with the text, for messages.

    Raises:
        RequestError: the text has too many names, values, entries or escapes.
        ValueError: the text is not JSON, or has an integer with too many digits.
        RecursionError: the text is nested too deeply for the parser.
    """
    if len(text) <= _SHORT_CHARS:
        return json.loads(text)
    _check_counts(text, name)
    with GC_PAUSE:
        return json.loads(text, parse_int=_integer, parse_float=_number)


def check_writable(value: object) -> None:
    """Raise ``ValueError`` if a value that was parsed from JSON cannot be written as UTF-8 JSON.

    Examples are lone surrogates and infinite numbers.
    """
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            one.encode()
        elif isinstance(one, dict):
            waiting += one.keys()
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one
        elif isinstance(one, float) and not math.isfinite(one):
            raise ValueError("the number is not finite")


def _check_counts(text: str, name: str) -> None:
    """Raise ``RequestError`` for a text with too many parts to parse in one call."""
    num_names = num_quotes = num_lists = num_entries = num_escapes = 0
    is_inside, rest = False, ""  # whether the piece begins inside a string; a split escape
    for start in range(0, len(text), _PIECE_CHARS):
        piece = rest + text[start : start + _PIECE_CHARS]
        num_slashes = len(piece) - len(piece.rstrip("\\"))
        rest = "\\" * (num_slashes % 2)  # the beginning of an escape that the next piece ends
        piece = piece.removesuffix(rest)
        if "\\" in piece:
            num_escapes += piece.count("\\") - piece.count("\\\\")
            piece = piece.replace("\\\\", "").replace('\\"', "")
        parts = piece.split('"')
        outside = "".join(parts[int(is_inside) :: 2])
        is_inside ^= len(parts) % 2 == 0
        num_quotes += len(parts) - 1
        num_names += outside.count(":")
        num_lists += outside.count("[") + outside.count("{")
        num_entries += outside.count(",")
        check_length(name, num_names, MAX_NAMES, "names of objects")
        check_length(name, num_quotes // 2 + num_lists, MAX_VALUES, "strings, lists and objects")
        check_length(name, num_entries, MAX_ENTRIES)
        check_length(name, num_escapes, MAX_ESCAPES, "escapes")


def _integer(digits: str) -> int:
    return int(digits)


def _number(digits: str) -> float:
    return float(digits)
