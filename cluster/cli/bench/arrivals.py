"""When requests are sent and how long they are: drawn at random, or read from a trace."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

BLOCK_TOKENS = 512
"""Tokens of a block in ``hash_ids``. Source: README of Mooncake's open traces."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request, without its content."""

    due_s: float
    """When it is sent, since the first one."""
    input_len: int
    """Tokens of its prompt."""
    output_len: int
    """Tokens of its answer."""
    blocks: Sequence[int] = ()
    """Names of the prompt's blocks in order: prompts share the blocks that they begin with."""
    block_len: int = BLOCK_TOKENS
    """Tokens of each of ``blocks``."""

    def prompt(self, vocab_size: int, seed: str) -> list[int]:
        """Its tokens; ``seed`` draws what is not in ``blocks``."""
        shared = [
            token
            for block in self.blocks
            for token in _tokens(f"{vocab_size} {block}", vocab_size, self.block_len)
        ][: self.input_len]
        return shared + _tokens(seed, vocab_size, self.input_len - len(shared))


def _tokens(seed: str, vocab_size: int, number: int) -> list[int]:
    return random.Random(seed).choices(range(vocab_size), k=number)


def poisson(
    number: int, rate_per_s: float, input_len: int, output_len: int, seed: int
) -> list[Arrival]:
    """Requests of equal lengths with exponential gaps; an infinite rate sends all at once."""
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
    """The requests of a trace, in order of time.

    Args:
        path: JSON lines with ``timestamp`` (milliseconds), ``input_length``, ``output_length`` and
            perhaps ``hash_ids``, as Mooncake publishes them; or, where the name ends in ``.csv``,
            ``TIMESTAMP,ContextTokens,GeneratedTokens``, as Azure does.
        number: take only so many; None: all.
        speed: how many times as fast as it was recorded.
        length: factor of all numbers of tokens, each of which stays above 0.

    Raises ``ValueError`` with the line, and ``OSError``.
    """
    parse = _azure if path.suffix == ".csv" else _mooncake
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file) if path.suffix == ".csv" else filter(str.strip, file)
        found = [_parsed(parse, row, place) for place, row in enumerate(rows, 1)]
    if not found:
        raise ValueError("it has no request")
    found = sorted(found, key=lambda a: a.due_s)[:number]
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


def _scaled(tokens: int, factor: float) -> int:
    return max(1, round(tokens * factor))


def _parsed(parse: Callable[[Any], Arrival], row: Any, place: int) -> Arrival:
    try:
        found = parse(row)
        if min(found.input_len, found.output_len) < 1 or not math.isfinite(found.due_s):
            raise ValueError("lengths must be above 0")
    except (ValueError, KeyError, TypeError, OverflowError) as err:
        reason = f"{err} is missing" if isinstance(err, KeyError) else str(err)
        raise ValueError(f"request {place}: {reason}") from err
    return found


def _mooncake(line: str) -> Arrival:
    row = json.loads(line)
    lengths = int(row["input_length"]), int(row["output_length"])
    return Arrival(float(row["timestamp"]) / 1000, *lengths, tuple(row.get("hash_ids", ())))


def _azure(row: dict[str, str]) -> Arrival:
    clock, _, fraction = row["TIMESTAMP"].partition(".")
    due_s = datetime.fromisoformat(f"{clock}+00:00").timestamp() + float(f"0.{fraction or 0}")
    return Arrival(due_s, int(row["ContextTokens"]), max(int(row["GeneratedTokens"]), 1))
