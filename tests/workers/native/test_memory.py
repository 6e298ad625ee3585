"""Memory for weights: large tensors begin in huge pages, and take no byte more than they have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.harness.distributed import run_ranks
from workers.native.memory import HUGE_PAGE_BYTES, empty

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage/enabled")
NUM_HUGE = 8
REST_BYTES = HUGE_PAGE_BYTES // 2


def has_huge_pages() -> bool:
    return SETTINGS.exists() and "[never]" not in SETTINGS.read_text()


def memory_of_this_process() -> tuple[int, int]:
    """Bytes of anonymous memory, and of those in huge pages."""
    lines = [line.split() for line in Path("/proc/self/smaps_rollup").read_text().splitlines()]
    sizes = {words[0]: int(words[1]) * 1024 for words in lines if words[-1] == "kB"}
    return sizes["Anonymous:"], sizes["AnonHugePages:"]


def fill(rank: int, size: int, ports: list[int]) -> tuple[int, int]:
    """What a tensor that was written takes more, at all and in huge pages."""
    before = memory_of_this_process()
    tensor = empty((NUM_HUGE * HUGE_PAGE_BYTES + REST_BYTES,), torch.uint8)
    tensor.fill_(1)
    after = memory_of_this_process()
    return after[0] - before[0], after[1] - before[1]


@pytest.mark.skipif(not has_huge_pages(), reason="the system has no huge pages")
def test_what_fills_huge_pages_is_in_them_and_the_rest_is_not() -> None:
    """In a process of its own, as others come and go in this one."""
    ((taken, huge),) = run_ranks(1, fill)
    assert NUM_HUGE // 2 * HUGE_PAGE_BYTES <= huge <= NUM_HUGE * HUGE_PAGE_BYTES  # as memory allows
    assert taken < NUM_HUGE * HUGE_PAGE_BYTES + REST_BYTES + HUGE_PAGE_BYTES // 4


@pytest.mark.parametrize("shape", [(3, 5), (0,), (3, 1 << 20), (1 << 21, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_any_size_hold_what_is_written(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor, other = empty(shape, dtype), empty(shape, dtype)
    tensor.fill_(1.0)
    other.fill_(2.0)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    assert bool((tensor == 1.0).all())
