"""A section of ``make gpu-check``, the place where it runs, and its report."""

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
    """Description of one section."""

    name: str
    """Name in ``--only``, which also accepts the part before the first ``-``."""
    what: str
    """Description for the list of sections."""
    function: str
    """``module:name`` of the function, which takes a ``Place`` and a ``Report``."""
    seconds: float
    """Weight of the section in the division of the time budget."""
    least_s: float
    """Least time with which the section is started."""
    is_correctness: bool = False
    """Whether the exit code depends on the section, even if it has no time."""
    needs_gpu: bool = True
    """Whether the section is skipped without a GPU."""
    only_by_name: bool = False
    """Whether the section runs only if ``--only`` names it, as it needs much of the budget."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Device, time limit and folder of a section."""

    device_name: str
    limit_s: float
    """Time after which the process is ended."""
    folder: Path
    """Folder for files of the section, empty at the start."""
    is_tiny: bool = False
    """Whether shapes are small, to check that everything runs."""

    @property
    def device(self) -> torch.device:
        import torch  # late: a section may do without

        return torch.device(self.device_name)

    @property
    def is_gpu(self) -> bool:
        return self.device_name.startswith("cuda")

    def size(self, whole: int, tiny: int) -> int:
        """Return ``whole``, or ``tiny`` if ``is_tiny``."""
        return tiny if self.is_tiny else whole


class Report:
    """Results of a section, written line by line so that a killed section keeps its results."""

    def __init__(self, write: Callable[[str], object]) -> None:
        """Create a report whose lines of JSON go to ``write``."""
        self._write = write
        self.num_failures = 0

    def value(self, name: str, value: object) -> None:
        """Report a measured value: a number, a text, or lists and mappings of them."""
        self._send({"value": [name, _plain(value)]})

    def say(self, line: str) -> None:
        """Report the summary line of the section; the last line counts."""
        self._send({"say": line})

    def check(self, is_right: bool, what: str) -> None:
        """Report the failure ``what`` unless ``is_right``."""
        if not is_right:
            self._fail(what)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Report an exception in the block as a failure and continue the section."""
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
    """Convert a value for JSON: six digits of numbers, and text for other types."""
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
