"""Text formats of JSON Schema as regular expressions.

Sources: RFC 3339, 5321 (without quoted names), 1123, 2673, 4291, 4122 and 3986 (any path).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from gateway.text.schemas.references import without_keywords

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
_QUERY = f"(?:{_CHAR}|[/?])*"
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
        "uri": rf"[a-zA-Z][a-zA-Z0-9+\-.]*:(?:{_CHAR}|/)+(?:\?{_QUERY})?(?:#{_QUERY})?",
    }
)
"""Regular expressions of the text formats that the grammar compiler supports, by format name."""


def is_known_format(name: object) -> bool:
    """Whether a format constrains texts.

    Other formats are annotations (JSON Schema, validation, section 7).
    """
    return isinstance(name, str) and name in FORMATS


def without_annotations(schema: Any) -> Any:
    """Return a schema without the formats that are annotations (do not constrain texts)."""
    return without_keywords(schema, _is_annotation)


def _is_annotation(schema: Mapping[str, Any], keyword: str) -> bool:
    value = schema[keyword]
    return keyword == "format" and isinstance(value, str) and not is_known_format(value)
