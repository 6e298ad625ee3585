"""JSON text from clients, read while other threads run.

The interpreter lock is held by each call into a compiled parser. A text is therefore counted first,
piece by piece, and refused where it holds more than the parser reads in some milliseconds. Numbers,
of which prompts have many, are converted by calls between which other threads run.
"""

from __future__ import annotations

import json
import math
from typing import Any

from gateway.core.field_checks import check_length
from gateway.offload.long_work import NO_COLLECTIONS

MAX_NAMES = 65_536
"""Names in all objects of a text together."""
MAX_VALUES = 131_072
"""Strings (names included), lists and objects of a text together."""
MAX_ENTRIES = 1_048_576
"""Entries of all lists and objects together: most can only be numbers."""
MAX_ESCAPES = 2_097_152
"""Escapes in all strings of a text together: more than a body has room for where each is a
character beyond ASCII."""
_SHORT_CHARS = 16_384
"""Shorter texts are parsed without counting."""
_PIECE_CHARS = 65_536


def load_json(text: str, name: str) -> Any:
    """The value of a JSON text.

    Args:
        text: any text.
        name: the field that it came with, for messages.

    Raises:
        RequestError: it holds too many names, values, entries or escapes.
        ValueError: it is not JSON, or holds an integer of too many digits.
        RecursionError: it is nested too deeply for the parser.
    """
    if len(text) <= _SHORT_CHARS:
        return json.loads(text)
    _check_counts(text, name)
    with NO_COLLECTIONS:
        return json.loads(text, parse_int=_integer, parse_float=_number)


def check_writable(value: object) -> None:
    """Raise ``ValueError`` if JSON in UTF-8 cannot represent a value that was parsed from JSON.

    Half of a surrogate pair is no text, and an infinite number no number.
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
    """Raise ``RequestError`` for a text that is too long to be parsed in one call."""
    num_names = num_quotes = num_lists = num_entries = num_escapes = 0
    is_inside, rest = False, ""  # of a string, at the beginning of the piece
    for start in range(0, len(text), _PIECE_CHARS):
        piece = rest + text[start : start + _PIECE_CHARS]
        num_slashes = len(piece) - len(piece.rstrip("\\"))
        rest = "\\" * (num_slashes % 2)  # begins an escape of the next piece
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
