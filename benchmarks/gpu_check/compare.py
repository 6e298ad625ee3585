"""Compares results on the device with results on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu_check.section import Report

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 4e-2}
"""Largest allowed differences of operators, relative to the largest value of the result or 1."""


class Worst:
    """Compares tensors and records the largest difference of each dtype."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float, str]] = {}
        """Dtype -> largest difference and the name of its operator."""

    def compare(
        self, report: Report, what: str, got: Tensor, want: Tensor, kind: torch.dtype | None = None
    ) -> None:
        """Compare two results; ``kind`` is the dtype of the computation if it differs."""
        kind = kind or want.dtype
        name = str(kind).removeprefix("torch.")
        if got.shape != want.shape or got.dtype != want.dtype:
            shapes = f"{got.dtype} {list(got.shape)}, not {want.dtype} {list(want.shape)}"
            report.check(False, f"{what} {name}: {shapes}")
            return
        difference = (got.cpu().double() - want.double()).abs() / max(1.0, _largest(want))
        off = _largest(difference)
        if off != off or off > self.found.get(name, (0.0, ""))[0]:
            self.found[name] = off, what
        report.check(off <= LIMITS[kind], f"{what} {name}: off by {off:.1e}")

    @property
    def words(self) -> str:
        """Summary such as ``largest difference 2e-06 (float32), 0.004 (bfloat16)``."""
        parts = [f"{off:.1g} ({name})" for name, (off, _) in self.found.items()]
        return "largest difference " + (", ".join(parts) or "0")


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
