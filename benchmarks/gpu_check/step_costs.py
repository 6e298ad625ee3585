"""Cost of an engine's steps: time, waits of the host, and kernels."""

from __future__ import annotations

import time
from itertools import islice
from statistics import median
from typing import Any

import torch

from benchmarks.gpu_check.device import host_waits, kernels_of
from benchmarks.harness.local_engine import LocalEngine


def steps(engine: LocalEngine, number: int) -> None:
    """Run some steps."""
    for _ in islice(iter(engine.step, None), number):
        pass


def median_step_s(engine: LocalEngine, number: int) -> float:
    """Median seconds of a step, which waits for the end of the step before it or of its own."""
    times = []
    for _ in range(number):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return median(times)


def cost_of_steps(engine: LocalEngine, device: torch.device, number: int) -> dict[str, Any]:
    """Waits of the host by position in the code, and kernels of a step; ``top`` are fractions."""
    with host_waits(device) as waits:
        steps(engine, number)
    kernels = kernels_of(device, lambda: steps(engine, number))
    return {
        "waits": waits.total() / number,
        "places": {place: count / number for place, count in waits.most_common()},
        "kernels": kernels.count / number,
        "busy_s": kernels.busy_s / number,
        "top": kernels.top(20),
    }
