"""Rows of ``benchmarks.memory_wall``, and the sizes and helpers that they share."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoints import random_checkpoint, random_tokenizer
from benchmarks.checkpoints.random_checkpoint import TINY, RandomModel
from benchmarks.memory_wall.bounds import BUFFER_BYTES, WIDTH, matrix_rate, read_bandwidth
from benchmarks.report import results
from benchmarks.report.quiet import wait_until_quiet

MINI = RandomModel()
"""0.5 GB in bfloat16."""
LAYERS = RandomModel(hidden=2048, layers=4, heads=16, ffn=1024)
"""4 layers as those of OLMoE-1B-7B, with its embedding and head; 3.8 GB."""
WHOLE = RandomModel(hidden=2048, layers=16, heads=16, ffn=1024)
"""OLMoE-1B-7B with random weights; 13.8 GB."""
_TINY_BYTES, _TINY_WIDTH = 1 << 22, 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    unit: str
    """Unit of ``measured`` and ``bound``."""
    measured: Sequence[float]
    """Measured value of each repeat."""
    bound: Sequence[float]
    """Bound of each repeat: the best value on this machine, or the largest allowed value."""
    asked: str
    """Goal of the ratio as text."""

    @property
    def ratio(self) -> float:
        """Median over the repeats of ``measured`` / ``bound`` within a repeat."""
        pairs = zip(self.measured, self.bound, strict=True)
        return statistics.median(value / limit for value, limit in pairs)


def at_least(lowest: float, aim: float | None = None) -> str:
    """Goal of a ratio that must not be lower: ``>= 0.8, aim 0.9``."""
    return f">= {lowest:g}" + (f", aim {aim:g}" if aim is not None else "")


def at_most(highest: float, aim: float | None = None) -> str:
    """Goal of a ratio that must not be higher: ``<= 1, aim 0.4``."""
    return f"<= {highest:g}" + (f", aim {aim:.2g}" if aim is not None else "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """Sizes and helpers of all rows."""

    folder: Path
    """Folder of the checkpoints."""
    repeats: int
    """Measurements of each row."""
    cores: int
    """Cores that are used, and threads of a single process."""
    is_tiny: bool
    """Whether sizes are tiny, to check that all rows run."""

    def checkpoint(self, model: RandomModel) -> Path:
        """A random checkpoint with a tokenizer, written unless it is in the folder already."""
        name = f"{model.family}-{model.hidden}x{model.layers}x{model.ffn}-{model.vocab}"
        if model.stored != "bfloat16":
            name += f"-{model.stored}"
        path = self.folder / name
        if not (path / "tokenizer.json").exists():
            random_checkpoint.write(model, path)
            random_tokenizer.write(path, model.vocab)
        return path

    def size(self, model: RandomModel) -> RandomModel:
        """Return the model, or a tiny one if ``is_tiny``."""
        return TINY if self.is_tiny else model

    def tokens(self, number: int) -> int:
        """Return the number of tokens or rows, at most 8 if ``is_tiny``."""
        return min(number, 8) if self.is_tiny else number

    def bandwidth(self, num_threads: int) -> float:
        """Bytes of memory that threads read in a second."""
        return read_bandwidth(num_threads, _TINY_BYTES if self.is_tiny else BUFFER_BYTES)

    def flops(self) -> float:
        """Floating-point operations a second of all cores in a product."""
        return matrix_rate(self.cores, _TINY_WIDTH if self.is_tiny else WIDTH)

    def wait(self) -> None:
        """Wait up to 10 s for other processes to be quiet."""
        wait_until_quiet(time.monotonic() + (0.0 if self.is_tiny else 10.0))


def report(rows: Sequence[Row]) -> str:
    """The table."""
    cells = [
        [
            f"{row.what}, {row.unit}",
            *(_shown(statistics.median(values)) for values in (row.measured, row.bound)),
            f"{row.ratio:.2f}",
            row.asked,
        ]
        for row in rows
    ]
    return results.table(["row, unit", "measured", "bound", "ratio", "goals for the ratio"], cells)


def _shown(value: float) -> str:
    """Format a value with three significant digits, or as an integer from 100."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
