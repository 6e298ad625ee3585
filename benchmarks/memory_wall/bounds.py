"""What this machine can do, what a model needs, and so how fast it can run at most."""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.checkpoints.random_checkpoint import RandomModel
from cluster.config.model import QuantizeLayers
from workers.model.loading.expert_format import with_form
from workers.native import memory
from workers.native.matrix import Matrix, MatrixFields
from workers.native.panels import DTYPES
from workers.native.thread_team import ThreadTeam, check, start_kernels
from workers.quantization.formats import WeightFormat
from workers.quantization.rounding import candidates

BUFFER_BYTES = 1 << 30
"""Read at once: more than any cache holds."""
_CHUNK_BYTES = 16 << 20
"""Of a file, read by one call."""
_ROW_WIDTH = 2048
"""Elements of the row by which all of the memory is multiplied."""
WIDTH = 2048
"""Rows and columns of the matrices whose product is timed."""
_PASSES = 3


def read_bandwidth(num_threads: int, num_bytes: int = BUFFER_BYTES) -> float:
    """Bytes of memory a second that so many threads read together in huge pages.

    The faster of torch, which adds up float32 numbers, and of our product of one float32 row, which
    fetches ahead: the best of three passes each. Both compute less than reading takes.
    """
    numbers = memory.empty((num_bytes // torch.float32.itemsize,), torch.float32)
    numbers.fill_(1.0)  # the pages exist from here on
    readers: list[Callable[[], object]] = [numbers.sum]
    if (team := start_kernels(num_threads).team) is not None:
        readers.append(partial(_multiply, team, numbers.view(-1, _ROW_WIDTH)))
    with _torch_threads(num_threads):
        return num_bytes / min(map(_shortest_s, readers))


def _multiply(team: ThreadTeam, panels: Tensor) -> Tensor:
    """Products of a row of ones with numbers [out, in] that count as packed."""
    outputs, inputs = panels.shape
    fields = MatrixFields(
        panels=panels.data_ptr(),
        outputs=outputs,
        inputs=inputs,
        dtype=DTYPES.index(panels.dtype),
    )
    x, out = torch.ones(inputs), torch.empty(outputs)
    run = team.library.functions.linear_run
    check(run(team.pointer, ctypes.byref(fields), x.data_ptr(), 1, out.data_ptr()))
    return out


def matrix_rate(num_threads: int, width: int) -> float:
    """Floating-point operations a second of so many threads in a product of square matrices.

    A multiplication and an addition count as two. The fastest of our kernels in bfloat16, and torch
    in bfloat16 and float32, the best of three passes each.
    """
    products: list[Callable[[], object]] = []
    x = torch.randn(width, width)
    for dtype in (torch.bfloat16, torch.float32):
        y = x.to(dtype)
        products.append(lambda y=y: y @ y.T)  # type: ignore[misc]
    if (team := start_kernels(num_threads).team) is not None:
        rows = x.to(torch.bfloat16)
        matrix = Matrix(team, rows)
        products.append(lambda: matrix.multiply(rows))
    with _torch_threads(num_threads), torch.inference_mode():
        return 2.0 * width**3 / min(map(_shortest_s, products))


def file_rate(files: Iterable[Path]) -> float:
    """Bytes a second of reading files from the first byte to the last, one after the other."""
    buffer, num_bytes = bytearray(_CHUNK_BYTES), 0
    start = time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                num_bytes += count
    return num_bytes / (time.perf_counter() - start)


def forget_files(files: Iterable[Path]) -> None:
    """Drop this system's page cache of files; a host beneath a virtual machine may keep its own."""
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # pages that are still to be written stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def step_weight_bytes(
    model: RandomModel,
    batch: int,
    itemsize: int,
    form: WeightFormat | None = None,
    layers: QuantizeLayers = "experts",
) -> float:
    """Bytes of weights that a decode step of ``batch`` rows reads, each once.

    All but the embedding, of which a row reads one line, and of the experts those that a row
    chooses: 1 - (1 - top_k / experts) ** batch of them on average where all are chosen alike, as
    random routers nearly do. KV is not counted; a row of the default model with 160 tokens of
    context reads 2.6 MB of it in bfloat16.

    ``form``: in which workers keep the experts, or all products (``layers``), with scales; norms,
    routers and the rest have ``itemsize`` bytes a number.
    """
    assert layers == "experts" or model.family == "olmoe", "its other matrices are known"
    family, total = model.described(), 0.0
    for bank in with_form(family.banks, form):
        chosen = 1 - (1 - bank.top_k / bank.num_experts) ** batch
        total += chosen * bank.num_experts * bank.num_bytes(itemsize)
    for part in family.attention_tensors():
        if "embed_tokens" in part.name:
            continue
        shape = part.part_shape
        is_product = len(shape) == 2 and not part.name.endswith("mlp.gate.weight")
        if form is not None and layers == "all" and is_product:
            kept = candidates(form, shape[1])[-1]  # of random weights that with the least error
            total += kept.num_bytes((shape[0], shape[1]))
        else:
            total += torch.Size(shape).numel() * itemsize
    return total


def decode_bound(
    model: RandomModel,
    batch: int,
    bandwidth: float,
    itemsize: int = 2,
    form: WeightFormat | None = None,
    layers: QuantizeLayers = "experts",
) -> float:
    """Tokens a second of decode steps that read each weight once and do nothing else.

    With the bandwidth of one core, it is the bound of an attention and an expert worker with a core
    each at batch 1 too: they read in turns. ``form``, ``layers``: see ``step_weight_bytes``.
    """
    return batch * bandwidth / step_weight_bytes(model, batch, itemsize, form, layers)


def prefill_flops(model: RandomModel, num_tokens: int) -> float:
    """Floating-point operations of one prompt, up to the logits of its last token.

    Products of the projections, the router and the chosen experts, scores and sums of causal
    attention; a multiplication and an addition count as two. Norms and rotations are not counted.
    """
    family = model.described()
    config = family.config
    assert config.latent_rank is None, "attention to latent vectors is not counted"
    assert config.delta_net is None, "recurrent states are not counted"
    matrices = [p for p in family.attention_tensors() if len(p.part_shape) == 2]
    layers = [p for p in matrices if "embed_tokens" not in p.name and "lm_head" not in p.name]
    products = float(sum(math.prod(p.part_shape) for p in layers))
    for bank in family.banks:
        products += bank.top_k * sum(math.prod(shape) for _, _, shape in bank.matrices)
    pairs = num_tokens * (num_tokens + 1) / 2  # of a query and a key that it sees
    attention = 2 * pairs * config.num_heads * config.head_dim * config.num_layers
    return 2.0 * (num_tokens * products + attention + model.hidden * model.vocab)


def two_worker_cap(attention: float, experts: float) -> float:
    """Largest share of two cores that an attention and an expert worker with a core each can use.

    ``attention`` and ``experts`` are what one core takes for each part of a step, in any unit: the
    longer part sets the pace, and the core of the other one waits. 3 and 1 -> 2/3.
    """
    return (attention + experts) / (2 * max(attention, experts))


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _shortest_s(call: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls."""
    found = []
    for _ in range(_PASSES):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)
