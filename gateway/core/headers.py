"""The priority and the time limit of a request in HTTP headers and gRPC metadata."""

from __future__ import annotations

import re
from dataclasses import replace

from cluster.core.errors import RequestError
from gateway.core.call import GenerateFields

PRIORITY_HEADER = "x-priority"
"""HTTP header and gRPC metadata for clients that cannot send the field."""
_PRIORITY_DIGITS = 10


def with_headers(
    fields: GenerateFields, priority: str | None, timeout_s: float | None
) -> GenerateFields:
    """The same fields, with what headers say: ``PRIORITY_HEADER`` is for fields without priority.

    Raises ``RequestError`` if it is not a whole number.
    """
    given = _read_priority(priority)
    wanted = given if fields.priority is None else fields.priority
    return replace(fields, priority=wanted, timeout_s=timeout_s)


def _read_priority(header: str | None) -> int | None:
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
