"""Candidates for attention of decode rows and of whole prompts: ours, torch's and FlashInfer's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu_check.candidates_measure import DTYPE, Call, Unfit
from benchmarks.gpu_check.operators_attention import BLOCK, Paged, Shape
from benchmarks.gpu_check.section import Place

_WORKSPACE_BYTES = 128 << 20
"""Of FlashInfer, as its documentation has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionCase:
    """Decode rows over a cache."""

    paged: Paged
    shape: Shape
    context: int

    @property
    def num_bytes(self) -> int:
        """Of the keys and values that are read."""
        rows = len(self.paged.rows[0])
        return 2 * rows * self.context * self.shape.num_kv_heads * self.shape.dim * DTYPE.itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillCase:
    """Whole prompts, each with nothing but its own rows in the cache."""

    paged: Paged
    shape: Shape
    prompts: int
    tokens: int
    """Of each."""

    @property
    def flops(self) -> int:
        """Of both products over the keys that a row sees, on average half of them."""
        return 2 * self.prompts * self.shape.num_heads * self.shape.dim * self.tokens**2

    @property
    def has_groups(self) -> bool:
        """Whether several query heads share keys and values."""
        return self.shape.num_heads != self.shape.num_kv_heads


def _attend(case: AttentionCase) -> Call:
    """What a server runs, with the writing of keys and values."""
    return case.paged.attend


def _sdpa(case: AttentionCase) -> Call:
    """SDPA over gathered blocks."""
    paged, heads = case.paged, case.shape.num_kv_heads
    tables, layer = paged.tables, paged.cache.layers[0]
    num_rows = len(tables)

    def call() -> Tensor:
        found = layer.index_select(1, tables.flatten()).view(2, heads, num_rows, -1, case.shape.dim)
        keys, values = found.transpose(1, 2).unbind(0)
        queries = paged.rows[0].unsqueeze(2)
        output = functional.scaled_dot_product_attention(
            queries, keys[:, :, : case.context], values[:, :, : case.context], enable_gqa=True
        )
        return output.reshape(num_rows, -1)

    return call


def _varlen(case: AttentionCase) -> Call:
    """torch's attention with a block table, from 2.13 on."""
    from torch.nn.attention.varlen import varlen_attn

    if "block_table" not in inspect.signature(varlen_attn).parameters:
        raise Unfit("this release of torch has no block table for it")
    paged, heads = case.paged, case.shape.num_kv_heads
    layer, num_rows = paged.cache.layers[0], len(paged.tables)
    keys, values = layer[:heads].permute(1, 2, 0, 3), layer[heads:].permute(1, 2, 0, 3)
    firsts = torch.arange(num_rows + 1, dtype=torch.int32, device=layer.device)
    lengths = torch.full((num_rows,), case.context, dtype=torch.int32, device=layer.device)
    more: dict[str, Any] = {"seqused_k": lengths, "block_table": paged.tables.int()}
    if case.shape.num_heads != heads:
        more["enable_gqa"] = True

    def call() -> Tensor:
        output = varlen_attn(paged.rows[0], keys, values, firsts, None, 1, case.context, **more)
        assert isinstance(output, Tensor)
        return output.reshape(num_rows, -1)

    return call


def _flashinfer(case: AttentionCase) -> Call:
    """FlashInfer's decode over a paged cache, planned once. It may compile its kernel first.

    Source: ``BatchDecodeWithPagedKVCacheWrapper`` in ``flashinfer/decode.py`` (0.2 and later): keys
    and values may have any strides, but both the same.
    """
    if not has_flashinfer():
        raise Unfit("not installed")
    flashinfer: Any = import_module("flashinfer")
    paged, heads = case.paged, case.shape.num_kv_heads
    layer, num_rows = paged.cache.layers[0], len(paged.tables)
    keys_and_values = layer[:heads].transpose(0, 1), layer[heads:].transpose(0, 1)
    blocks = -(-case.context // BLOCK)
    numbers: dict[str, Any] = {"dtype": torch.int32, "device": layer.device}
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=layer.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "HND", use_tensor_cores=case.shape.num_heads > heads
    )
    wrapper.plan(
        torch.arange(0, num_rows * blocks + 1, blocks, **numbers),
        paged.tables[:, :blocks].flatten().int(),
        torch.full((num_rows,), case.context - (blocks - 1) * BLOCK, **numbers),
        case.shape.num_heads,
        heads,
        case.shape.dim,
        BLOCK,
        q_data_type=DTYPE,
        kv_data_type=DTYPE,
    )

    def call() -> Tensor:
        output: Tensor = wrapper.run(paged.rows[0], keys_and_values)
        return output.reshape(num_rows, -1)

    return call


def has_flashinfer() -> bool:
    """Whether it is installed."""
    return find_spec("flashinfer") is not None


def _attend_whole(case: PrefillCase) -> Call:
    """What a server runs: SDPA for each prompt, with the writing of keys and values."""
    return case.paged.attend


def _own_kernel(case: PrefillCase) -> Call:
    """Our kernel, which a server takes for prompts whose beginning is in the cache."""
    batch = case.paged.batch.paged
    if batch is None:
        raise Unfit("needs a GPU")
    from workers.cuda.prefill_attention import prefill

    queries, cache = case.paged.rows[0], case.paged.cache.layers[0]
    out = torch.empty_like(queries)

    def call() -> Tensor:
        places = (batch.tables, batch.lengths, batch.first_rows)
        prefill(queries, cache, *places, case.tokens, None, out)
        return out.view(len(out), -1)

    return call


def _sdpa_whole(case: PrefillCase) -> Call:
    """SDPA of all prompts in one call."""

    def call() -> Tensor:
        split = (x.view(case.prompts, -1, *x.shape[1:]) for x in case.paged.rows)
        queries, keys, values = (x.transpose(1, 2) for x in split)
        output = functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=case.has_groups
        )
        return output.transpose(1, 2).reshape(case.prompts * case.tokens, -1)

    return call


def _varlen_whole(case: PrefillCase) -> Call:
    """torch's attention of prompts of any lengths in one call."""
    from torch.nn.attention.varlen import varlen_attn

    (queries, keys, values), tokens = case.paged.rows, case.tokens
    last = case.prompts * tokens
    firsts = torch.arange(0, last + 1, tokens, dtype=torch.int32, device=queries.device)
    is_old = "is_causal" in inspect.signature(varlen_attn).parameters  # before windows
    more: dict[str, Any] = {"is_causal": True} if is_old else {"window_size": (-1, 0)}
    if case.has_groups:
        more["enable_gqa"] = True

    def call() -> Tensor:
        output = varlen_attn(queries, keys, values, firsts, firsts, tokens, tokens, **more)
        assert isinstance(output, Tensor)
        return output.reshape(last, -1)

    return call


DECODE: Mapping[str, Callable[[AttentionCase], Call]] = {
    "ours": _attend,
    "gathered SDPA": _sdpa,
    "varlen with a block table": _varlen,
}
"""The first is what the others are compared with; it writes the keys and values they read."""
FLASHINFER: Mapping[str, Callable[[AttentionCase], Call]] = {
    "ours": _attend,
    "FlashInfer": _flashinfer,
}
"""Beside what it may compile for minutes, so that it comes last."""
PREFILL: Mapping[str, Callable[[PrefillCase], Call]] = {
    "ours": _attend_whole,
    "our kernel": _own_kernel,
    "SDPA": _sdpa_whole,
    "varlen": _varlen_whole,
}
"""The same as ``DECODE``."""


def attention_case(place: Place, num_rows: int) -> AttentionCase:
    """Rows of OLMoE-1B-7B that decode, each with a context of its own."""
    context = place.size(1024, 32)
    shape = Shape(num_heads=16, num_kv_heads=16, dim=place.size(128, 8))
    paged = Paged(shape, [(context, 1)] * num_rows, DTYPE, place.device)
    assert context % BLOCK == 0
    return AttentionCase(paged=paged, shape=shape, context=context)


def prefill_case(place: Place, prompts: int, tokens: int) -> PrefillCase:
    """Prompts for OLMoE-1B-7B."""
    shape = Shape(num_heads=16, num_kv_heads=16, dim=place.size(128, 8))
    paged = Paged(shape, [(tokens, tokens)] * prompts, DTYPE, place.device)
    return PrefillCase(paged=paged, shape=shape, prompts=prompts, tokens=tokens)
