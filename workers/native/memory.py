"""Memory for weights, in huge pages if Linux supports them.

In a virtual machine a TLB miss is expensive, and small pages need 512 times as many entries. Two
layers of OLMoE-1B-7B, 1 sequence, on one thread of an AMD EPYC in a virtual machine took 32 ms a
token if ``huge_pages.collapse`` moved 0.3 of 2.2 GB, and 26 ms with all weights in huge pages. The
first access to 1 GB takes 0.2 s instead of 0.5 s. This access takes 1 to 3 s if the host must first
provide the memory, for example after the guest has reported the memory as free.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 * 1024 * 1024
"""Size of a huge page on x86-64."""


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Allocate an uninitialized CPU tensor, in its own memory if it fills at least a huge page.

    The remainder after the last full huge page uses small pages, so no memory is wasted.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    num_huge = num_bytes // HUGE_PAGE_BYTES
    if not num_huge or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    buffer = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags)  # untouched pages use no memory
    memory = torch.frombuffer(buffer, dtype=torch.uint8)
    first = -memory.data_ptr() % HUGE_PAGE_BYTES
    with contextlib.suppress(OSError):  # a system without huge pages
        buffer.madvise(mmap.MADV_HUGEPAGE, first, num_huge * HUGE_PAGE_BYTES)
    return memory[first : first + num_bytes].view(dtype).view(*shape)
