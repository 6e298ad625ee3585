"""Reads and validates the requests of a batch file.

Source of the format: https://developers.openai.com/api/reference/resources/batches
"""

from __future__ import annotations

import json
import math
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cluster.core.checks import is_deeper
from cluster.core.errors import RequestError

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
"""Endpoints to which a request of a batch may be sent."""
MAX_REQUESTS = 50_000
"""Maximum number of requests in a batch file, equal to OpenAI's limit."""
MAX_ID_CHARS = 512
_FIELDS = frozenset({"custom_id", "method", "url", "body"})
_MAX_DEPTH = 128
"""Maximum nesting of JSON objects and arrays in a line; servers have lower limits for bodies."""
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Limits of a batch file: endpoints, number of requests, and size of a line."""

    endpoints: Sequence[str] = ENDPOINTS
    max_requests: int = MAX_REQUESTS
    max_line_bytes: int = 4 << 20


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One request, which is one line of a batch file."""

    custom_id: str
    """Client's id of the request, which the response repeats."""
    url: str
    """Endpoint that the request calls, for example ``/v1/chat/completions``."""
    body: dict[str, Any]


class LineError(RequestError):
    """A line of a batch file is invalid."""

    def __init__(self, message: str, param: str | None, code: str, line: int) -> None:
        super().__init__(message, param, code)
        self.args = (message, param, code, line)
        self.line = line
        """Number of the invalid line, counted from 1."""


class RequestFile:
    """A batch file that was validated as a whole and is read line by line."""

    def __init__(self, path: Path, places: array[int], ids: frozenset[str]) -> None:
        self._path = path
        self._offsets = places
        self.ids = ids
        """The ``custom_id`` of every request in the file."""

    @classmethod
    def check(cls, path: Path, limits: BatchLimits | None = None) -> Self:
        """Read and validate a whole batch file.

        Args:
            path: path of the file.
            limits: limits of the file; None for the defaults.

        Raises:
            RequestError: for the first invalid line (``LineError``), or if there is no request.
            OSError: the file cannot be read.
        """
        limits = limits or BatchLimits()
        places, ids = array("q"), set[str]()
        with path.open("rb") as file:
            place, number = 0, 0
            while line := file.readline(limits.max_line_bytes + 1):
                number += 1
                if len(line) > limits.max_line_bytes:
                    raise _line_error(number, "", f"has more than {limits.max_line_bytes} bytes")
                if line.strip():
                    request = read_request(line, number, limits.endpoints)
                    if request.custom_id in ids:
                        raise _line_error(number, "custom_id", f"{request.custom_id!r} came before")
                    if len(ids) == limits.max_requests:
                        rule = f"is beyond the limit of {limits.max_requests} requests"
                        raise _line_error(number, "", rule)
                    ids.add(request.custom_id)
                    places.append(place)
                place += len(line)
        if not ids:
            raise RequestError("the file has no request: at least one line is needed")
        return cls(path, places, frozenset(ids))

    def __len__(self) -> int:
        return len(self._offsets)

    def requests(self) -> Iterator[BatchRequest]:
        """Yield all requests in file order. Raises ``RequestError`` if the file has changed."""
        with self._path.open("rb") as file:
            for number, place in enumerate(self._offsets, 1):
                file.seek(place)
                yield read_request(file.readline(), number, None)


def read_request(line: bytes, number: int, endpoints: Sequence[str] | None) -> BatchRequest:
    """Parse line ``number`` of a batch file as a request.

    ``endpoints``: allowed URLs; None allows any. Raises ``RequestError``.
    """
    found = _parsed(line, number)
    if not isinstance(found, dict):
        raise _line_error(number, "", "must be an object")
    if unknown := sorted(set(found) - _FIELDS):
        raise _line_error(
            number, str(unknown[0])[:64], f"is not one of {', '.join(sorted(_FIELDS))}"
        )
    custom_id, method = found.get("custom_id"), found.get("method", "POST")
    url, body = found.get("url"), found.get("body")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= MAX_ID_CHARS:
        raise _line_error(number, "custom_id", f"must be a text of 1 to {MAX_ID_CHARS} characters")
    if method != "POST":
        raise _line_error(number, "method", f"({str(method)[:32]!r}) must be POST")
    if not isinstance(url, str) or (endpoints is not None and url not in endpoints):
        rule = f"({str(url)[:64]!r}) must be one of {', '.join(endpoints or ())}"
        raise _line_error(number, "url", rule)
    if not isinstance(body, dict):
        raise _line_error(number, "body", "must be an object")
    if body.get("stream"):
        raise _line_error(number, "body.stream", "must be false: a batch has whole answers")
    return BatchRequest(custom_id, url, body)


def _parsed(line: bytes, number: int) -> Any:
    """Parse a line to a value that can be written as JSON again. Raises ``RequestError``."""
    try:
        text = line.decode("utf-8-sig")
        found = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite_number)
        if _SURROGATE_ESCAPE.search(text):
            json.dumps(found, ensure_ascii=False).encode()  # fails for a lone surrogate
    except RecursionError as err:
        raise _too_deep(number) from err
    except ValueError as err:  # also undecodable bytes and numbers that are too large
        raise _line_error(number, "", "is not JSON") from err
    if text.count("{") + text.count("[") > _MAX_DEPTH and is_deeper(found, _MAX_DEPTH):
        raise _too_deep(number)
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite_number(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:32]} is too large")
    return number


def _too_deep(number: int) -> RequestError:
    return _line_error(number, "", f"is nested too deeply: at most {_MAX_DEPTH} levels")


def _line_error(number: int, field: str, rule: str) -> RequestError:
    where = f"line {number}: {field} " if field else f"line {number} "
    return LineError(f"{where}{rule}", field or None, "", number)
