"""What a clean schema says of texts, for forms that write them without quotes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from gateway.text.forms.alternatives import (
    Alternative,
    UnfollowedError,
    kinds_of_alternative,
    values_of,
)
from gateway.text.forms.patterns import full_match, in_grammar, without

_YEAR_DAY = (
    "[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)|02-(?:0[1-9]|1[0-9]|2[0-9]))"
)
_CLOCK = (
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:(?:[0-5][0-9]|60)(?:\.[0-9]+)?"
    "(?:[zZ]|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
)
_TIME_PARTS = "T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S)"
_DATE_PARTS = "(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"
_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_HOST = rf"{_LABEL}(?:\.{_LABEL})*"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"(?:{_BYTE}\.){{3}}{_BYTE}"
_HEX = "[0-9a-fA-F]"
_GROUP = f"{_HEX}{{1,4}}"
_IPV6 = "|".join(
    [
        f"(?:{_GROUP}:){{7}}{_GROUP}",
        f"(?:{_GROUP}:){{1,7}}:",
        *(f"(?:{_GROUP}:){{1,{7 - n}}}(?::{_GROUP}){{1,{n}}}" for n in range(1, 7)),
        f":(?::{_GROUP}){{1,7}}",
        "::",
    ]
)
_CHAR = rf"(?:[a-zA-Z0-9\-._~!$&'()*+,;=:@]|%{_HEX}{{2}})"
_ATOM = r"[a-zA-Z0-9!#$%&'*+\-/=?\^_`{|}~]+"
FORMATS = MappingProxyType(
    {
        "date": _YEAR_DAY,
        "time": _CLOCK,
        "date-time": f"{_YEAR_DAY}[tT]{_CLOCK}",
        "duration": f"P(?:{_DATE_PARTS}(?:{_TIME_PARTS})?|{_TIME_PARTS}|[0-9]+W)",
        "email": rf"{_ATOM}(?:\.{_ATOM})*@{_HOST}",
        "hostname": _HOST,
        "ipv4": _IPV4,
        "ipv6": _IPV6,
        "uuid": f"{_HEX}{{8}}-(?:{_HEX}{{4}}-){{3}}{_HEX}{{12}}",
        "uri": rf"[a-zA-Z][a-zA-Z0-9+\-.]*:(?:{_CHAR}|/)+(?:\?(?:{_CHAR}|[/?])*)?(?:#(?:{_CHAR}|[/?])*)?",
    }
)
"""Sources: RFC 3339, 5321 (without quoted names), 1123, 2673, 4291, 4122 and 3986 (any path)."""


@dataclass(frozen=True, slots=True)
class TextRule:
    """Texts that follow all of its parts."""

    values: tuple[str, ...] | None = None
    """The only texts; None: any."""
    patterns: tuple[str, ...] = ()
    """Each matches the whole text."""

    @property
    def is_any(self) -> bool:
        return self.values is None and not self.patterns

    def expression(self, end: str) -> str:
        """Of a grammar; the texts do not hold ``end``."""
        parts = list(map(in_grammar, self.patterns))
        holds_end = self.values is None or any(end in value for value in self.values)
        if self.values is not None:
            parts.insert(0, f"({' | '.join(map(json.dumps, self.values))})")
        if holds_end:
            parts.append(in_grammar(without(end)))
        return " & ".join(parts)


def text_rules(found: Sequence[Alternative], is_strict: bool) -> list[TextRule]:
    """What texts may be: one of the rules holds; none: no text is allowed.

    Raises:
        UnfollowedError: if strict, a pattern cannot be followed.
    """
    texts = (one for one in found if "string" in kinds_of_alternative(one))
    rules = list(dict.fromkeys(_rule(one, is_strict) for one in texts))
    return [TextRule()] if any(rule.is_any for rule in rules) else rules


def _rule(pieces: Alternative, is_strict: bool) -> TextRule:
    values: list[str] | None = None
    patterns: list[str] = []
    least, most = 0, None
    for piece in pieces:
        if (given := values_of(piece)) is not None:
            own = [value for value in given if isinstance(value, str)]
            values = own if values is None else [value for value in values if value in own]
        if "pattern" in piece:
            matching = full_match(piece["pattern"])
            if matching is not None:
                patterns.append(matching)
            elif is_strict:
                raise UnfollowedError("pattern has anchors within groups, which is not followed")
        if "format" in piece:
            patterns.append(FORMATS[piece["format"]])
        least = max(least, piece.get("minLength", 0))
        if "maxLength" in piece:
            most = min(piece["maxLength"], piece["maxLength"] if most is None else most)
    if least or most is not None:
        patterns.append(f"(?s:.{{{least},{'' if most is None else most}}})")
    return TextRule(None if values is None else tuple(dict.fromkeys(values)), tuple(patterns))
