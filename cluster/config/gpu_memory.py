"""Computes the memory of a GPU for keys and values after the weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.core.checks import check

_CONTEXT_BYTES = 1 << 30
"""Maximum bytes of a GPU that a process uses beyond its tensors, for the CUDA context and kernels.
A process on a shared GPU cannot measure this share of the used memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuMemory:
    """Memory of one worker's GPU after its weights are loaded."""

    total_bytes: int
    free_bytes: int
    """Bytes of the GPU that no process uses."""
    own_bytes: int
    """Bytes of this process's tensors on the GPU."""
    share: float = 1.0
    """Share of the GPU that the worker may use: ``gpus_per_worker``."""

    @property
    def used_bytes(self) -> int:
        """Bytes in use that count against this worker's share."""
        if self.share == 1.0:
            return self.total_bytes - self.free_bytes
        return self.own_bytes + _CONTEXT_BYTES


def kv_budget(
    memory: GpuMemory,
    reserves: Mapping[str, int],
    *,
    utilization: float,
    asked_bytes: int | None,
    block_bytes: int,
    state_bytes: int = 0,
) -> int:
    """Return the bytes for keys and values, at least one block; ``asked_bytes`` if they fit.

    ``reserves``: bytes that steps allocate later, by purpose. ``state_bytes``: bytes of recurrent
    states, which are allocated separately from KV. Raises ``ConfigError``.

    Example: 80 GB, 16 of them used, 4 reserved, utilization 0.9: 72 - 16 - 4 = 52 GB.
    """
    if asked_bytes is not None:
        rule = f"must fit into the {_gib(memory.free_bytes)} that are free on the GPU"
        rule += f" of {_gib(memory.total_bytes)}"
        rule += f", beside {_gib(state_bytes)} of recurrent states" if state_bytes else ""
        has_room = asked_bytes + state_bytes <= memory.free_bytes
        check(has_room, "kv_cache_bytes", _gib(asked_bytes), rule)
        return asked_bytes
    if state_bytes:
        reserves = {"recurrent states": state_bytes, **reserves}
    limit = int(utilization * memory.share * memory.total_bytes)
    room = min(limit - memory.used_bytes, memory.free_bytes) - sum(reserves.values())
    share = "" if memory.share == 1.0 else f", a share of {memory.share:g}"
    kept = "".join(f", {_gib(size)} for {what}" for what, size in reserves.items())
    rule = (
        f"must leave memory for KV, {_gib(block_bytes)} at least: of the GPU's "
        f"{_gib(memory.total_bytes)}{share}, {_gib(memory.used_bytes)} are in use{kept}"
    )
    check(room >= block_bytes, "gpu_memory_utilization", utilization, rule)
    return room


def check_slots(
    num_workers: int,
    num_slots: int,
    num_bytes: int,
    free_bytes: int,
    reserves: Mapping[str, int],
) -> None:
    """Raise ``ConfigError`` if a GPU has too little memory for a worker's expert slots.

    ``num_bytes``: bytes of the slots. ``reserves``: bytes that steps allocate later, by purpose.
    """
    kept = "".join(f", of which {_gib(size)} are for {what}" for what, size in reserves.items())
    rule = (
        f"must be more, or spare and recovery slots fewer: each holds {num_slots} expert slots a "
        f"bank, {_gib(num_bytes)}, and its GPU has {_gib(free_bytes)} free{kept}"
    )
    is_enough = num_bytes + sum(reserves.values()) <= free_bytes
    check(is_enough, "num_expert_workers", num_workers, rule)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.3g} GiB"
