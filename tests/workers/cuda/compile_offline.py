"""Compiles the kernels for a GPU that is not there, as their launches would. A process of its own.

``python -m tests.workers.cuda.compile_offline 90 bfloat16`` prints a line of JSON for each; with
``all`` behind it, it compiles them for all shapes and formats.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from tests.workers.cuda.device import SHARED_BYTES
from tests.workers.quantization.random import FORMATS
from workers.cuda import expert_tiles, experts
from workers.cuda.decode_attention import decode
from workers.cuda.draw import draw_rows
from workers.cuda.experts import GateActivation, Matrices, gate_up, make_pairs, multiply
from workers.cuda.heads import prepare_heads
from workers.cuda.norms import norm, sum_and_norm
from workers.cuda.prefill_attention import prefill
from workers.cuda.routing import RoutingParams, Scoring, choose
from workers.cuda.row_sums import sum_rows
from workers.cuda.slots import check_slots, slots_by_rank
from workers.model import fp8
from workers.native.draws import NUM_DRAW_INTEGERS
from workers.quantization.formats import WeightFormat
from workers.quantization.matrix import empty_weight, parts_of

SLOTS, TOP_K, HIDDEN, INNER = 64, 8, 2048, 1024
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")


class Offline:
    """What the compiler asks a driver, without a device."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


class Compiled:
    """``kernel[grid]``: launches compile only."""

    def __init__(self, kernel: Any, grid: object) -> None:
        self._kernel, self._grid = kernel, grid

    def __call__(self, *args: object, **options: object) -> None:
        made = self._kernel.run(*args, grid=self._grid, warmup=True, **options)
        code = made.asm["ptx"]
        found = {
            "kernel": self._kernel.fn.__name__,
            "shared_bytes": made.metadata.shared,
            "has_tensor_cores": "mma" in code,
            "cubin_bytes": len(made.asm["cubin"]),
        }
        sys.stdout.write(json.dumps(found) + "\n")


def weights(shape: tuple[int, int], dtype: torch.dtype, form: WeightFormat | None) -> Matrices:
    """Of all slots, in the memory of one."""
    parts = parts_of(empty_weight(form, shape, dtype))
    return Matrices.of([part.expand(SLOTS, *part.shape) for part in parts], form, shape[1])


def compile_experts(
    dtype: torch.dtype,
    num_rows: int,
    activation: Any,
    has_bias: bool = False,
    form: WeightFormat | None = None,
) -> None:
    slots, factors = torch.zeros(num_rows, TOP_K, dtype=torch.int64), torch.ones(num_rows, TOP_K)
    pairs = make_pairs(slots, SLOTS, None, TOP_K, dtype)
    inputs = torch.empty(num_rows, HIDDEN, dtype=dtype)
    biases = torch.empty(SLOTS, 2 * INNER, 1, dtype=dtype) if has_bias else None
    own = GateActivation(activation, 1.702, 7.0)
    rows = gate_up(inputs, weights((2 * INNER, HIDDEN), dtype, form), biases, pairs, own)
    outputs = multiply(rows, weights((HIDDEN, INNER), dtype, form), biases, pairs.of_outputs())
    sum_rows(outputs, slots, factors, True, dtype)


def caches_of(
    dtype: torch.dtype, num_kv_heads: int, dim: int, is_whole: bool
) -> list[torch.Tensor]:
    """One in fp8 and, of the whole, one in the type of the model."""
    shape = (2 * num_kv_heads, 16, 16)
    of_model = [torch.empty(*shape, dim, dtype=dtype)] if is_whole else []
    return [*of_model, torch.empty(*shape, fp8.row_bytes(dim), dtype=fp8.ROW_DTYPE)]


def compile_attention(
    dtype: torch.dtype, shape: tuple[int, int, int], window: int | None, is_whole: bool
) -> None:
    dim, num_heads, num_kv_heads = shape
    queries = torch.empty(4, num_heads, dim, dtype=dtype)
    tables, lengths = torch.zeros(4, 64, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    out, first_rows = torch.empty_like(queries), torch.zeros(5, dtype=torch.int32)
    for cache in caches_of(dtype, num_kv_heads, dim, is_whole):
        if is_whole:
            decode(queries, cache, tables, lengths, window, out)
            prefill(queries, cache, tables, lengths, first_rows, 512, window, out, True)
        sinks = torch.zeros(num_heads)
        decode(queries, cache, tables, lengths, window, out, sinks=sinks)
        prefill(queries, cache, tables, lengths, first_rows, 512, window, out, sinks=sinks)


def compile_half(dtype: torch.dtype, shape: tuple[int, int, int], is_whole: bool) -> None:
    dim, num_heads, num_kv_heads = shape
    num_rows, width = 3, (num_heads + num_kv_heads) * dim
    rows = torch.empty(num_rows, width + num_kv_heads * dim, dtype=dtype)
    waves = torch.empty(num_rows, 1, dim, dtype=dtype), torch.empty(num_rows, 1, dim, dtype=dtype)
    slots = torch.zeros(num_rows, dtype=torch.int64)
    for weight in (None, torch.empty(width, dtype=dtype), torch.empty(width // dim, dim)):
        own = None if weight is None else weight.to(dtype)
        for cache in caches_of(dtype, num_kv_heads, dim, is_whole):
            prepare_heads(rows, num_heads, own, 1e-5, None, waves, cache, slots)
    hidden, scale = torch.empty(num_rows, HIDDEN, dtype=dtype), torch.empty(HIDDEN, dtype=dtype)
    norm(hidden, scale, 1e-5)
    sum_and_norm(hidden, hidden, scale, 1e-5)
    scorings: tuple[Scoring, ...] = ("softmax", "softmax_of_best", "sigmoid")
    for scoring in scorings:
        choice = RoutingParams(
            top_k=TOP_K, scoring=scoring, is_normed=True, least_sum=0.0, scale=1.0
        )
        choose(torch.empty(num_rows, SLOTS, dtype=dtype), choice, None, dtype)
    ids, table = torch.zeros(num_rows, TOP_K, dtype=torch.int64), torch.zeros(2, SLOTS).int()
    slots_by_rank(table, ids, torch.empty(num_rows, TOP_K, dtype=dtype), slots)
    slots_by_rank(table, ids, None, None)
    received = torch.zeros(num_rows, 2 * TOP_K, dtype=torch.int32)[:, :TOP_K]
    filled, counts = torch.ones(SLOTS + 1, dtype=torch.bool), torch.zeros(SLOTS, dtype=torch.int64)
    check_slots(received, filled, torch.zeros(num_rows, TOP_K, dtype=torch.int64), counts, counts)


def compile_draws(dtype: torch.dtype, vocab_size: int) -> None:
    params = torch.zeros(NUM_DRAW_INTEGERS, 3, dtype=torch.int64).t()
    for is_masked in (False, True):
        draw_rows(torch.empty(3, vocab_size, dtype=dtype), params, is_masked)


def main() -> None:
    capability, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
    is_whole = "all" in sys.argv
    driver.set_active(Offline(capability))
    expert_tiles.shared_bytes = lambda device: SHARED_BYTES[capability]
    experts.has_float8 = lambda device: capability >= 89
    JITFunction.__getitem__ = lambda kernel, grid: Compiled(kernel, grid)
    for num_rows in (1, 64, 300, 1100) if is_whole else ():
        compile_experts(dtype, num_rows, "silu")
    for activation in ACTIVATIONS[1:] if is_whole else ():
        compile_experts(dtype, 1, activation)
    compile_experts(dtype, 1, "clamped_swiglu", has_bias=True)
    for form in FORMATS if is_whole else FORMATS[-1:]:
        compile_experts(dtype, 1100, "silu", form=form)
    for vocab_size in (300, 50_304, 151_936) if is_whole else (50_304,):
        compile_draws(dtype, vocab_size)
    compile_attention(dtype, (128, 16, 16), None, is_whole)
    compile_half(dtype, (128, 16, 16), is_whole)
    for shape in ((64, 32, 8), (256, 8, 4), (24, 4, 2)) if is_whole else ():
        compile_attention(dtype, shape, None, is_whole)
        compile_attention(dtype, shape, 77, is_whole)
        compile_half(dtype, shape, is_whole)


if __name__ == "__main__":
    main()
