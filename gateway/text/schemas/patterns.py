"""Converts regular expressions of JSON schemas to regular expressions of grammars.

A schema's pattern (ECMA 262) may match any part of a text. Grammars match whole texts, with the
syntax of Rust's ``regex`` and without anchors.
"""

from __future__ import annotations

import re

_SEARCH = "(?s:.*)"
_CLASSES = {
    "d": "[0-9]",
    "D": "[^0-9]",
    "w": "[A-Za-z0-9_]",
    "W": "[^A-Za-z0-9_]",
    "/": "/",
}
"""ASCII replacements of regular expression escapes that match all of Unicode in Rust."""
_PART = re.compile(r"\\.|\[\^?\]?|.", re.DOTALL)
_PART_OF_CLASS = re.compile(r"\\.|.", re.DOTALL)
_QUANTIFIER = re.compile(r"(?:[*+?]|\{[0-9]+(?:,[0-9]*)?\})")
_MAX_QUANTIFIER_CHARS = 64


def full_match(pattern: str) -> str | None:
    """Return a pattern that matches exactly the texts in which ``pattern`` is found.

    For example ``^a|b$`` gives ``(?:a(?s:.*)|(?s:.*)b)``. None if ``pattern`` has anchors
    elsewhere than at the ends of a top-level branch.
    """
    branches: list[list[str]] = [[]]
    depth, is_class, is_after_quantifier = 0, False, False
    starts, ends = [False], [False]
    position = 0
    while position < len(pattern):
        match = (_PART_OF_CLASS if is_class else _PART).match(pattern, position)
        assert match is not None, "any character matches"
        part, position = match[0], match.end()
        was_quantifier, is_after_quantifier = is_after_quantifier, False
        if is_class:
            is_class = part != "]"
            branches[-1].append(_in_class(part))
        elif ends[-1] and not (part == "|" and depth == 0):
            return None  # the pattern continues after "$"
        elif part.startswith("["):
            is_class = True
            branches[-1].append(part.replace("]", "\\]"))
        elif part == "^":
            if depth or branches[-1] or starts[-1]:
                return None
            starts[-1] = True
        elif part == "$":
            if depth:
                return None
            ends[-1] = True
        elif part == "|" and depth == 0:
            branches.append([])
            starts.append(False)
            ends.append(False)
        elif part == "?" and was_quantifier:
            pass  # lazy quantifiers make no difference for whole texts
        else:
            depth += {"(": 1, ")": -1}.get(part, 0)
            branches[-1].append(_escaped(part))
            is_after_quantifier = _ends_with_quantifier(pattern, match.start(), part)
    framed = (
        ("" if is_start else _SEARCH) + "".join(branch) + ("" if is_end else _SEARCH)
        for branch, is_start, is_end in zip(branches, starts, ends, strict=True)
    )
    return f"(?:{'|'.join(framed)})"


def pattern_without(end: str) -> str:
    """Return a pattern of the texts that do not contain ``end``.

    ``end`` must contain its first character only once. For example ``<p`` gives
    ``[^<]*(?:<(?:|[^<p][^<]*))*``.
    """
    first, rest = _literal(end[0]), end[1:]
    inner = ""
    for char in reversed(rest):
        one = _literal(char)
        further = f"|{one}{inner}" if inner else ""
        inner = f"(?:|[^{first}{one}][^{first}]*{further})"
    return f"[^{first}]*(?:{first}{inner})*"


def grammar_regex(pattern: str) -> str:
    """Return a regular expression as grammars write it, in slashes: ``a/b`` becomes ``/a\\/b/``."""
    parts: list[str] = []
    is_escaped = False
    for char in pattern:
        slash = "/" if is_escaped else "\\/"
        parts.append({"/": slash, "\n": "n" if is_escaped else "\\n"}.get(char, char))
        is_escaped = char == "\\" and not is_escaped
    return f"/{''.join(parts)}/"


def _escaped(part: str) -> str:
    return _CLASSES.get(part[1:], part) if part.startswith("\\") else part


def _in_class(part: str) -> str:
    """Escape a part of a character class: ``[``, ``&&`` and ``~~`` have another meaning in Rust."""
    return f"\\{part}" if part in ("[", "&", "~") else _escaped(part)


def _ends_with_quantifier(pattern: str, position: int, part: str) -> bool:
    if part in ("*", "+", "?"):
        return True
    opening = pattern.rfind("{", max(0, position - _MAX_QUANTIFIER_CHARS), position)
    return (
        part == "}"
        and opening >= 0
        and bool(_QUANTIFIER.fullmatch(pattern[opening : position + 1]))
    )


def _literal(char: str) -> str:
    return re.escape(char)
