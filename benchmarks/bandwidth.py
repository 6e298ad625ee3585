"""How fast this machine reads memory, and what a decode step must read: the bound of its rate."""

from __future__ import annotations

import mmap
import time

import torch

from benchmarks.random_checkpoint import RandomModel

_BUFFER_BYTES = 1 << 30
"""Read at once: more than any cache holds."""
_PASSES = 3


def read_bandwidth(num_threads: int, num_bytes: int = _BUFFER_BYTES) -> float:
    """Bytes a second that so many threads read together, the best of three passes.

    They add up float32 numbers in huge pages, which costs less time than reading them.
    """
    buffer = mmap.mmap(-1, num_bytes)
    buffer.madvise(mmap.MADV_HUGEPAGE)
    numbers = torch.frombuffer(buffer, dtype=torch.float32)
    numbers.fill_(1.0)  # the pages exist from here on
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        return num_bytes / min(_seconds(numbers) for _ in range(_PASSES))
    finally:
        torch.set_num_threads(before)


def _seconds(numbers: torch.Tensor) -> float:
    start = time.perf_counter()
    numbers.sum()
    return time.perf_counter() - start


def step_weight_bytes(model: RandomModel, batch: int, itemsize: int) -> float:
    """Bytes of weights that a decode step of ``batch`` rows reads, each once.

    All but the embedding, of which a row reads one line, and of the experts those that a row
    chooses: 1 - (1 - top_k / experts) ** batch of them on average where all are chosen alike, as
    random routers nearly do. KV is not counted; a row of the default model with 160 tokens of
    context reads 2.6 MB of it in bfloat16.
    """
    chosen = 1 - (1 - model.top_k / model.experts) ** batch
    total = 0.0
    for name, shape in model.shapes().items():
        if "embed_tokens" not in name:
            share = chosen if ".experts." in name else 1.0
            total += share * torch.Size(shape).numel() * itemsize
    return total
