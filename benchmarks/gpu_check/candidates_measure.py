"""Measures candidates: different kernels for the same work."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.gpu_check.device import seconds_of
from benchmarks.gpu_check.section import Place

Call = Callable[[], Tensor]
Case = TypeVar("Case")
DTYPE = torch.bfloat16


class Unfit(Exception):
    """A candidate does not support this case; the text has the reason."""


def measure(
    place: Place, candidates: Mapping[str, Callable[[Case], Call]], case: Case, unit: str, work: int
) -> dict[str, Any]:
    """For each candidate: time, rate in ``unit``, difference from the first one; or a reason."""
    found: dict[str, Any] = {}
    known: Tensor | None = None
    for name, make in candidates.items():
        try:
            call = make(case)
            result = call().float()
            known = result if known is None else known
            seconds = seconds_of(place.device, call, passes=3)
        except Unfit as err:
            found[name] = str(err)
        except Exception as err:  # of another release of torch, or another device
            found[name] = f"{type(err).__name__}: {err}"[:200]
        else:
            off = float((result - known).abs().max())
            found[name] = {"seconds": seconds, f"{unit}_per_s": work / seconds, "off": off}
    return found


def fastest(found: Mapping[str, Any]) -> str:
    """Name of the fastest candidate of a case."""
    times = {n: f["seconds"] for n, f in found.items() if isinstance(f, dict)}
    return min(times, key=lambda name: times[name], default="none")
