"""The priority of a request whose client can set headers only."""

from __future__ import annotations

import re
from dataclasses import replace

from cluster.core.errors import RequestError
from gateway.core.call import GenerateFields

PRIORITY_HEADER = "x-priority"
"""HTTP header and gRPC metadata for clients that cannot send the field."""
_PRIORITY_DIGITS = 10


def with_header_priority(fields: GenerateFields, header: str | None) -> GenerateFields:
    """The same fields, with the priority of ``PRIORITY_HEADER`` where they have none.

    Raises ``RequestError`` if it is not a whole number.
    """
    given = header_priority(header)
    return (
        fields if given is None or fields.priority is not None else replace(fields, priority=given)
    )


def header_priority(header: str | None) -> int | None:
    """The number in ``PRIORITY_HEADER``.

    Raises ``RequestError`` if it is not a whole number, or one of more digits than any that fits.
    """
    if header is None:
        return None
    number = re.fullmatch(r"[+-]?([0-9]+)", header.strip())
    if number is None or len(number[1]) > _PRIORITY_DIGITS:
        rule = f"at least {-(2**31)} and at most {2**31 - 1}" if number else "a whole number"
        message = f"{PRIORITY_HEADER} ({header[:32]!r}) must be {rule}"
        raise RequestError(message, PRIORITY_HEADER)
    return int(header)
