"""Constraints of a JSON schema on texts, for tool call formats that write texts without quotes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.text.schemas.alternatives import (
    Alternative,
    UnsupportedSchemaError,
    allowed_values,
    types_of_alternative,
)
from gateway.text.schemas.formats import FORMATS
from gateway.text.schemas.patterns import full_match, grammar_regex, pattern_without


@dataclass(frozen=True, slots=True)
class TextRule:
    """Constraints that a text argument must all match."""

    values: tuple[str, ...] | None = None
    """The allowed texts; None allows any text."""
    patterns: tuple[str, ...] = ()
    """Regular expressions that must each match the whole text."""

    @property
    def is_any(self) -> bool:
        return self.values is None and not self.patterns

    def expression(self, end: str) -> str:
        """Return a grammar expression of the allowed texts that do not contain ``end``."""
        parts = list(map(grammar_regex, self.patterns))
        holds_end = self.values is None or any(end in value for value in self.values)
        if self.values is not None:
            parts.insert(0, f"({' | '.join(map(json.dumps, self.values))})")
        if holds_end:
            parts.append(grammar_regex(pattern_without(end)))
        return " & ".join(parts)


def text_rules(expanded: Sequence[Alternative], is_strict: bool) -> list[TextRule]:
    """Return rules. A text must match at least one of them; empty if no text is allowed.

    ``expanded`` has the alternatives of a schema.

    Raises:
        UnsupportedSchemaError: ``is_strict``, and a pattern is not supported.
    """
    texts = (one for one in expanded if "string" in types_of_alternative(one))
    rules = list(dict.fromkeys(_rule(one, is_strict) for one in texts))
    return [TextRule()] if any(rule.is_any for rule in rules) else rules


def _rule(pieces: Alternative, is_strict: bool) -> TextRule:
    values: dict[str, None] | None = None
    patterns: list[str] = []
    min_length, max_length = 0, None
    for piece in pieces:
        if (piece_values := allowed_values(piece)) is not None:
            texts = dict.fromkeys(value for value in piece_values if isinstance(value, str))
            values = texts if values is None else {one: None for one in values if one in texts}
        if "pattern" in piece:
            matching = full_match(piece["pattern"])
            if matching is not None:
                patterns.append(matching)
            elif is_strict:
                raise UnsupportedSchemaError("has a pattern with anchors that are not at its ends")
        if "format" in piece:
            patterns.append(FORMATS[piece["format"]])
        min_length = max(min_length, piece.get("minLength", 0))
        if "maxLength" in piece:
            max_length = min(
                piece["maxLength"], piece["maxLength"] if max_length is None else max_length
            )
    if min_length or max_length is not None:
        patterns.append(f"(?s:.{{{min_length},{'' if max_length is None else max_length}}})")
    return TextRule(None if values is None else tuple(values), tuple(patterns))
