"""Clocks and counters of a device: time, waits of the host, and kernels."""

from __future__ import annotations

import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

_WAIT = "called a synchronizing CUDA operation"
"""Text of torch's warning about a wait, in its debug mode."""


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(
    device: torch.device, call: Callable[[], object], *, passes: int = 5, calls: int = 10
) -> float:
    """Seconds of a call on the device, in the fastest of several passes of ``calls`` calls."""
    call()
    found: list[float] = []
    make_event: Any = torch.cuda.Event
    for _ in range(passes):
        synchronize(device)
        if device.type == "cuda":
            first, last = (make_event(enable_timing=True) for _ in range(2))
            first.record()
            for _ in range(calls):
                call()
            last.record()
            last.synchronize()
            found.append(first.elapsed_time(last) / 1e3)
        else:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            found.append(time.perf_counter() - start)
    return min(found) / calls


def host_seconds_of(device: torch.device, call: Callable[[], object], calls: int = 100) -> float:
    """Median seconds of single calls on the host, each with an idle device before it."""
    call()
    found = []
    for _ in range(calls):
        synchronize(device)
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return sorted(found)[len(found) // 2]


@contextmanager
def host_waits(device: torch.device) -> Iterator[Counter[str]]:
    """Count the waits of the host for the device in the block, by ``file:line``."""
    waits: Counter[str] = Counter()
    if device.type != "cuda":
        yield waits
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for entry in seen:
        if _WAIT in str(entry.message):
            waits[f"{os.path.relpath(entry.filename)}:{entry.lineno}"] += 1


def captured(device: torch.device, call: Callable[[], Tensor]) -> tuple[Any, Tensor]:
    """A CUDA graph of a call, and the tensor that each replay writes."""
    make_stream: Any = torch.cuda.Stream
    stream = make_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    return graph, found


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """Kernels that ran on a device, including memory copies."""

    count: int
    busy_s: float
    """Seconds in which at least one kernel ran."""
    seconds: dict[str, float]
    """Seconds by name of the kernel, the longest first."""

    def top(self, number: int) -> list[tuple[str, float]]:
        """Names of the longest kernels and their fractions of the total time."""
        whole = sum(self.seconds.values()) or 1.0
        return [(name[:120], took / whole) for name, took in list(self.seconds.items())[:number]]


def kernels_of(device: torch.device, call: Callable[[], object]) -> Kernels:
    """Run a call under torch's profiler; on a CPU, operators stand for kernels."""
    is_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * is_gpu
    synchronize(device)
    with profile(activities=activities, acc_events=True) as profiler:
        call()
        synchronize(device)
    events: Sequence[Any] = profiler.events() or ()
    own = [
        event
        for event in events
        if event.device_type.name == ("CUDA" if is_gpu else "CPU")
        and (is_gpu or event.cpu_parent is None)
    ]
    spans = [(e.time_range.start, e.time_range.end) for e in own]
    took: Counter[str] = Counter()
    for event, (first, last) in zip(own, spans, strict=True):
        took[event.name] += last - first
    return Kernels(
        count=len(own),
        busy_s=covered(spans) / 1e6,
        seconds={name: micros / 1e6 for name, micros in took.most_common()},
    )


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of spans: [(0, 2), (1, 3), (5, 6)] -> 4."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(last - max(first, end), 0.0)
        end = max(end, last)
    return total
