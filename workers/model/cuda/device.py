"""Properties of a GPU, read through ``torch.cuda``."""

from __future__ import annotations

import contextlib
from importlib.util import find_spec

import torch

from cluster.config.gpu_memory import GpuMemory

_HAS_NVML = find_spec("pynvml") is not None
"""Whether torch can ask the driver how busy a GPU is."""
_TRANSFERS_PER_CLOCK = 2
"""Transfers per clock cycle of GPU memory (double data rate); CUDA reports the clock."""


def gpu_facts(device: torch.device) -> tuple[str, float]:
    """Return the GPU's name and its memory bandwidth in bytes per second (0: unknown)."""
    found = torch.cuda.get_device_properties(device)
    kilohertz = getattr(found, "memory_clock_rate", 0)
    bits = getattr(found, "memory_bus_width", 0)
    return found.name, _TRANSFERS_PER_CLOCK * 1e3 * kilohertz * bits / 8


def gpu_memory(device: torch.device, share: float = 1.0) -> GpuMemory:
    """Return a GPU's memory sizes, after freeing memory that torch caches. ``share``: part of the
    GPU that the worker may use, 1 for all."""
    torch.cuda.empty_cache()
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return GpuMemory(
        total_bytes=total_bytes,
        free_bytes=free_bytes,
        own_bytes=torch.cuda.memory_reserved(device),
        share=share,
    )


def gpu_stats(device: torch.device) -> dict[str, float]:
    """Return gauges of a GPU by metric name without prefix; empty for a CPU. May be called on any
    thread."""
    if device.type != "cuda":
        return {}
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    found = {
        "gpu_memory_used_bytes": float(total_bytes - free_bytes),
        "gpu_memory_total_bytes": float(total_bytes),
    }
    if _HAS_NVML:
        with contextlib.suppress(Exception):  # pynvml's: a part of a GPU (MIG) does not support it
            found["gpu_utilization_perc"] = torch.cuda.utilization(device) / 100
    return found
