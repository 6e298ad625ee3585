"""Arrival times and lengths of requests: random, or read from a trace."""

from __future__ import annotations

import csv
import heapq
import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

MAX_TOKENS = 10_000_000
"""Maximum number of tokens of a prompt or output in a trace; exceeds the context of any model."""
BLOCK_TOKENS = 512
"""Number of tokens in a block of ``hash_ids``. Source: README of Mooncake's open traces."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """Arrival time and lengths of one request."""

    due_s: float
    """Scheduled time of sending, in seconds after the first request."""
    input_len: int
    """Number of prompt tokens."""
    output_len: int
    """Number of output tokens."""
    blocks: Sequence[int] = ()
    """Ids of the prompt's token blocks in order; blocks with equal ids have equal tokens."""
    block_len: int = BLOCK_TOKENS
    """Number of tokens in each block of ``blocks``."""

    def prompt(self, vocab_size: int, seed: str) -> list[int]:
        """Make the token ids of the prompt; ``seed`` generates the tokens outside ``blocks``."""
        shared = [
            token
            for block in self.blocks
            for token in _tokens(f"{vocab_size} {block}", vocab_size, self.block_len)
        ][: self.input_len]
        return shared + _tokens(seed, vocab_size, self.input_len - len(shared))


def _tokens(seed: str, vocab_size: int, number: int) -> list[int]:
    """Return ``number`` random tokens.

    Uses numpy, because slow code would delay the event loop, which also measures times.
    """
    import numpy as np  # slow to import

    draw = np.random.default_rng(list(seed.encode()))
    found: list[int] = draw.integers(0, vocab_size, number).tolist()
    return found


def poisson(
    number: int, rate_per_s: float, input_len: int, output_len: int, seed: int
) -> list[Arrival]:
    """Make arrivals of equal lengths with exponential gaps, or without gaps at an infinite rate."""
    draw = random.Random(f"{seed} gaps")
    due_s = 0.0
    found = []
    for _ in range(number):
        found.append(Arrival(due_s, input_len, output_len))
        due_s += draw.expovariate(rate_per_s) if math.isfinite(rate_per_s) else 0.0
    return found


def read_trace(
    path: Path, number: int | None, *, speed: float = 1.0, length: float = 1.0
) -> list[Arrival]:
    """Read the requests of a trace, in order of time.

    Args:
        path: JSON lines with ``timestamp`` (milliseconds), ``input_length``, ``output_length`` and
            optionally ``hash_ids``, as Mooncake publishes them; or, if the name ends in ``.csv``,
            ``TIMESTAMP,ContextTokens,GeneratedTokens``, as Azure does.
        number: read only the first ``number`` requests in time; None: all.
        speed: factor by which requests arrive faster than recorded.
        length: factor of all prompt and output lengths, which stay at least 1 token.

    Raises ``ValueError`` with the number of the request, and ``OSError``.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = _azure_rows(file) if path.suffix == ".csv" else _mooncake_rows(file)
        found = _first(rows, number)
    if not found:
        raise ValueError("it has no requests")
    first_s = found[0].due_s
    return [
        replace(
            a,
            due_s=(a.due_s - first_s) / speed,
            input_len=_scaled(a.input_len, length),
            output_len=_scaled(a.output_len, length),
            block_len=_scaled(a.block_len, length),
        )
        for a in found
    ]


def _first(rows: Iterator[Arrival], number: int | None) -> list[Arrival]:
    """Return the first ``number`` requests in order of time, holding only these in memory.

    None: all requests.
    """
    if number is None:
        return sorted(rows, key=_due_s)
    return heapq.nsmallest(number, rows, key=_due_s)


def _due_s(arrival: Arrival) -> float:
    return arrival.due_s


def _scaled(tokens: int, factor: float) -> int:
    return max(1, round(tokens * factor))


def _mooncake_rows(file: Iterable[str]) -> Iterator[Arrival]:
    for place, line in enumerate(filter(str.strip, file), 1):
        with _names_request(place):
            row = json.loads(line)
            prompt, output = (_length(n, row[n]) for n in ("input_length", "output_length"))
            due_s = float(row["timestamp"]) / 1000
            if not math.isfinite(due_s):
                raise ValueError("timestamp must be a number")
            yield Arrival(due_s, prompt, output, tuple(row.get("hash_ids") or ()))


def _azure_rows(file: Iterable[str]) -> Iterator[Arrival]:
    """Yield the requests of an Azure trace. A request without output tokens gets one."""
    rows = csv.DictReader(file)
    for place in itertools.count(1):
        with _names_request(place):
            row = next(rows, None)
            if row is None:
                return
            when = datetime.fromisoformat(row["TIMESTAMP"])
            due_s = (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
            prompt = _length("ContextTokens", int(row["ContextTokens"]))
            output = int(row["GeneratedTokens"]) or 1
            yield Arrival(due_s, prompt, _length("GeneratedTokens", output))


def _length(name: str, value: Any) -> int:
    """Return ``value`` if it is a valid number of tokens; ``name``: its name in the trace.

    Raises ``ValueError`` for any other value.
    """
    if type(value) is not int or not 0 < value <= MAX_TOKENS:
        raise ValueError(f"{name} ({value}) must be a whole number from 1 to {MAX_TOKENS}")
    return value


@contextmanager
def _names_request(place: int) -> Iterator[None]:
    """Convert errors in the ``with`` block to a ``ValueError`` with request number ``place``."""
    try:
        yield
    except (ValueError, ArithmeticError, KeyError, TypeError, AttributeError, csv.Error) as err:
        reason = f"{err} is missing" if isinstance(err, KeyError) else str(err)
        raise ValueError(f"request {place}: {reason}") from err
