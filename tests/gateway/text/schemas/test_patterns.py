"""Patterns of schemas as regular expressions of grammars."""

from __future__ import annotations

import pytest

from gateway.text.schemas.patterns import full_match


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("^a|b$", "(?:a(?s:.*)|(?s:.*)b)"),
        ("^[&/]{2,}?$", r"(?:[\&/]{2,})"),
        (r"^\d*?a{1,2}?$", r"(?:[0-9]*a{1,2})"),
        ("a^", None),
        ("$a", None),
        ("", "(?:(?s:.*)(?s:.*))"),
    ],
)
def test_patterns_match_whole_texts(pattern: str, expected: str | None) -> None:
    assert full_match(pattern) == expected
