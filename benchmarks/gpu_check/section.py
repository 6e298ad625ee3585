"""What a section is, where it runs, and how it reports."""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One line of the table."""

    name: str
    """``--only`` takes it, or what is before its first ``-``."""
    what: str
    """For people."""
    function: str
    """``module:name`` of a function of a ``Place`` and a ``Report``."""
    seconds: float
    """Its part of the budget, beside those of the others."""
    least_s: float
    """With less it is not started."""
    is_correctness: bool = False
    """The exit code depends on it, also where it has no time."""
    needs_gpu: bool = True
    """It is skipped without one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a section runs."""

    device_name: str
    limit_s: float
    """Its process is ended after this time."""
    folder: Path
    """For its files; empty at first."""
    is_tiny: bool = False
    """Small shapes: to see that everything runs."""

    @property
    def device(self) -> torch.device:
        import torch  # late: a section may do without

        return torch.device(self.device_name)

    @property
    def is_gpu(self) -> bool:
        return self.device_name.startswith("cuda")

    def size(self, whole: int, tiny: int) -> int:
        """A size, or a tiny one."""
        return tiny if self.is_tiny else whole


class Report:
    """What a section finds, written line by line: a section that is ended keeps what it found."""

    def __init__(self, write: Callable[[str], object]) -> None:
        """``write`` takes a line of JSON."""
        self._write = write
        self.num_failures = 0

    def value(self, name: str, value: object) -> None:
        """Something measured or seen: a number, a text, or lists and tables of them."""
        self._send({"value": [name, _plain(value)]})

    def say(self, line: str) -> None:
        """The section in a few words; the last ones count."""
        self._send({"say": line})

    def check(self, is_right: bool, what: str) -> None:
        """Something that must be so; ``what`` names it where it is not."""
        if not is_right:
            self._fail(what)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Whatever goes wrong within it is a failure, and the section goes on."""
        try:
            yield
        except Exception as err:
            self._fail(f"{name}: {type(err).__name__}: {err}")
            self.value(f"{name}: traceback", traceback.format_exc().splitlines()[-12:])

    def _fail(self, what: str) -> None:
        self.num_failures += 1
        self._send({"failure": what})

    def _send(self, entry: Mapping[str, object]) -> None:
        self._write(json.dumps(entry, allow_nan=False) + "\n")


def _plain(value: object) -> Any:
    """For JSON: six digits of numbers, and texts for what JSON has no form for."""
    match value:
        case bool() | int() | str() | None:
            return value
        case float():
            return float(f"{value:.6g}") if math.isfinite(value) else str(value)
        case Mapping():
            return {str(key): _plain(inner) for key, inner in value.items()}
        case Sequence():
            return [_plain(inner) for inner in value]
    return str(value)
