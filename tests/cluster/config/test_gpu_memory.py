"""What a GPU leaves for keys and values, and what it has no room for."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config.gpu_memory import GpuMemory, check_slots, kv_budget
from cluster.core.errors import ConfigError

GIB = 1 << 30
FRESH = {"total_bytes": 80 * GIB, "free_bytes": 64 * GIB, "own_bytes": 15 * GIB}
"""80 GiB, of which a worker's weights and CUDA take 16."""


def budget(
    memory: dict[str, Any] | None = None, share: float = 1.0, asked: int | None = None, **more: Any
) -> int:
    values: dict[str, Any] = {"utilization": 0.9, "block_bytes": GIB, **more}
    found = GpuMemory(**(memory or FRESH), share=share)
    reserves = {"steps": 3 * GIB, "NCCL": GIB}
    return kv_budget(found, reserves, asked_bytes=asked, **values)


def test_kv_takes_what_weights_and_steps_leave() -> None:
    assert budget() == 72 * GIB - 16 * GIB - 4 * GIB
    assert budget(utilization=0.5) == (40 - 16 - 4) * GIB


def test_memory_of_other_processes_is_not_taken() -> None:
    crowded = {**FRESH, "free_bytes": 30 * GIB}
    assert budget(crowded) == (72 - 50 - 4) * GIB


def test_a_worker_with_a_part_of_a_gpu_counts_its_own_memory() -> None:
    assert budget(share=0.5) == (36 - (15 + 1) - 4) * GIB
    late = {**FRESH, "free_bytes": 10 * GIB}  # the other worker has taken its share
    assert budget(late, share=0.5) == (10 - 4) * GIB


def test_a_given_size_wins_where_it_fits() -> None:
    assert budget(asked=63 * GIB, utilization=0.1) == 63 * GIB
    with pytest.raises(ConfigError) as refused:
        budget(asked=65 * GIB)
    assert str(refused.value) == (
        "kv_cache_bytes (65 GiB) must fit into the 64 GiB that are free on the GPU of 80 GiB"
    )


def test_recurrent_states_are_taken_beside_kv() -> None:
    assert budget(state_bytes=5 * GIB) == budget() - 5 * GIB
    assert budget(asked=59 * GIB, state_bytes=5 * GIB) == 59 * GIB
    with pytest.raises(ConfigError) as refused:
        budget(asked=60 * GIB, state_bytes=5 * GIB)
    assert str(refused.value) == (
        "kv_cache_bytes (60 GiB) must fit into the 64 GiB that are free on the GPU of 80 GiB, "
        "beside 5 GiB of recurrent states"
    )
    with pytest.raises(ConfigError, match=r"16 GiB are in use, 52 GiB for recurrent states, 3 GiB"):
        budget(state_bytes=52 * GIB)


def test_a_gpu_without_room_for_kv_is_refused_by_its_numbers() -> None:
    assert budget(utilization=21 / 80) == GIB
    with pytest.raises(ConfigError) as refused:
        budget(utilization=0.25)
    assert str(refused.value) == (
        "gpu_memory_utilization (0.25) must leave memory for KV, 1 GiB at least: of the GPU's "
        "80 GiB, 16 GiB are in use, 3 GiB for steps, 1 GiB for NCCL"
    )
    with pytest.raises(ConfigError, match=r"80 GiB, a share of 0.25, 16 GiB are in use"):
        budget(share=0.25)


def test_expert_slots_that_do_not_fit_are_refused_by_their_numbers() -> None:
    check_slots(2, 40, 63 * GIB, 64 * GIB, {"steps": GIB})
    with pytest.raises(ConfigError) as refused:
        check_slots(2, 40, 64 * GIB, 64 * GIB, {"steps": GIB})
    assert str(refused.value) == (
        "num_expert_workers (2) must be more, or spare and recovery slots fewer: each holds 40 "
        "expert slots a bank, 64 GiB, and its GPU has 64 GiB free, of which 1 GiB are for steps"
    )
