"""Memory for weights, in huge pages where Linux has them.

Behind a hypervisor a miss of the address translation is expensive, and small pages have 512 times
as many addresses. Two layers of OLMoE-1B-7B, one thread of an AMD EPYC in a virtual machine, 1
sequence: 32 ms a token where ``huge_pages.collapse`` moved 0.3 of 2.2 GB, 26 ms with all of it in
huge pages. To touch 1 GB first takes 0.2 s in place of 0.5, unless the host has to find the memory,
as it does after the guest has reported it as free: 1 to 3 s.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

HUGE_PAGE_BYTES = 2 * 1024 * 1024
"""On x86-64."""


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A CPU tensor with undefined contents; from a huge page on, in memory of its own.

    What does not fill a huge page takes small ones, so no byte beyond the tensor is used.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    num_huge = num_bytes // HUGE_PAGE_BYTES
    if not num_huge or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=dtype)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    buffer = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES, flags)  # what is not touched takes none
    memory = torch.frombuffer(buffer, dtype=torch.uint8)
    first = -memory.data_ptr() % HUGE_PAGE_BYTES
    with contextlib.suppress(OSError):  # a system without them
        buffer.madvise(mmap.MADV_HUGEPAGE, first, num_huge * HUGE_PAGE_BYTES)
    return memory[first : first + num_bytes].view(dtype).view(*shape)
