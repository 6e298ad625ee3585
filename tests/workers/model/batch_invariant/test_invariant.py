"""Products and attention whose rows do not depend on each other, and how that is tried."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from cluster.core.errors import ConfigError
from tests.harness.tiers import quick_values
from tests.workers.model.test_attention import plain
from workers.experts.kernels_invariant import (
    BlockExperts,
    InvariantKernels,
    LoopExperts,
    pairs_agree,
)
from workers.model.attention_batch import (
    AttentionBatch,
    DecodeGroup,
    PrefillChunk,
    Workspace,
    chunk_mask,
)
from workers.model.batch_invariant.attention_tiles import attend_tiles
from workers.model.batch_invariant.invariant import (
    LINEAR_FORMS,
    ProductVariant,
    RowInvariantBlocks,
    RowInvariantLinear,
    tiles_agree,
)
from workers.model.batch_invariant.row_invariance import NUM_TRIED_ROWS, random_rows, rows_agree
from workers.model.compute_threads import ComputeThreads
from workers.model.config import Activation, ExchangeSpec
from workers.model.layers import gated_activation, row_sigmoid
from workers.model.loading.attention_model import load_attention_model
from workers.model.loading.checkpoint import Checkpoint

pytestmark = pytest.mark.heavy

CPU = torch.device("cpu")
SWIGLU = ExchangeSpec(index=0, name="mlp", in_width=24, out_width=24, expert_width=16)
DTYPES = [torch.float32, torch.bfloat16]


def test_the_trial_finds_rows_that_depend_on_their_number_or_place() -> None:
    rows = random_rows(NUM_TRIED_ROWS, 8, dtype=torch.float32)
    assert rows_agree(lambda x: x * 3, rows)
    assert not rows_agree(lambda x: x * (1 + (len(x) == 2)), rows)
    assert not rows_agree(lambda x: x * (1 + (len(x) == 65)), rows)
    assert not rows_agree(lambda x: x + torch.arange(len(x)).unsqueeze(1) // 40, rows)
    ulp = torch.finfo(torch.float32).eps
    assert not rows_agree(lambda x: x * (1 + ulp * (len(x) < 4)), rows), "one bit is enough"


@pytest.mark.parametrize("width", [6, 8, 33, 64])
def test_sigmoid_of_a_row_does_not_depend_on_its_place(width: int) -> None:
    rows = random_rows(NUM_TRIED_ROWS, width, dtype=torch.float32)
    assert rows_agree(row_sigmoid, rows)
    assert torch.allclose(row_sigmoid(rows), rows.sigmoid())


@pytest.mark.parametrize("form", LINEAR_FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 24), (33, 7), (520, 260)])
def test_products_of_every_form_are_right(
    shape: tuple[int, int], dtype: torch.dtype, form: ProductVariant
) -> None:
    weight = random_rows(*shape, dtype=dtype) / shape[1] ** 0.5
    bias = random_rows(shape[0], dtype=dtype)
    linear = RowInvariantLinear(weight.clone(), bias, form, ComputeThreads())
    rows = random_rows(NUM_TRIED_ROWS, shape[1], dtype=dtype)
    expected = functional.linear(rows.double(), weight.double(), bias.double())
    error = (linear(rows).double() - expected).abs() / (1 + expected.abs())
    assert error.max() < (1e-5 if dtype == torch.float32 else 0.02)
    assert linear(rows[:0]).shape == (0, shape[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 24), (33, 7), (520, 260)])
def test_products_do_not_depend_on_the_number_of_rows(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """In the form that this machine allows: which one that is depends on its processor."""
    bias = random_rows(shape[0], dtype=dtype)
    linear = RowInvariantBlocks(CPU).linear(random_rows(*shape, dtype=dtype), bias)
    assert rows_agree(linear, random_rows(NUM_TRIED_ROWS, shape[1], dtype=dtype).flip(0) * 3)


def rejecting(number: int) -> Callable[[Callable[[Tensor], Tensor], Tensor], bool]:
    """A machine on which the first forms fail."""
    tried = []

    def agree(function: Callable[[Tensor], Tensor], rows: Tensor) -> bool:
        tried.append(function)
        return len(tried) > number

    return agree


def test_the_next_form_is_taken_where_one_fails_and_none_is_refused() -> None:
    weight = random_rows(48, 24, dtype=torch.float32)
    rows = random_rows(3, 24, dtype=torch.float32)
    expected = functional.linear(rows, weight)
    for number in range(3):
        linear = RowInvariantBlocks(CPU, rejecting(number)).linear(weight.clone())
        assert torch.allclose(linear(rows), expected, atol=1e-5)
    with pytest.raises(ConfigError, match=r"not possible on this machine: .*float32.*\[48, 24\]"):
        RowInvariantBlocks(CPU, rejecting(3)).linear(weight)


def test_a_shape_is_tried_once() -> None:
    tried = []

    def agree(function: Callable[[Tensor], Tensor], rows: Tensor) -> bool:
        tried.append(rows.shape)
        return True

    blocks = RowInvariantBlocks(CPU, agree)
    for out in (16, 16, 24):
        blocks.linear(torch.zeros(out, 8))
    assert tried == [(NUM_TRIED_ROWS, 8)] * 2


def test_a_model_is_refused_where_rows_are_not_independent(
    tiny_checkpoint: Path,
) -> None:
    checkpoint = Checkpoint(tiny_checkpoint)
    blocks = RowInvariantBlocks(CPU, lambda function, rows: False)
    with pytest.raises(ConfigError, match="depends on the other rows"):
        checkpoint.family.attention_model(checkpoint, torch.float32, CPU, None, blocks)
    load_attention_model(checkpoint, torch.float32, CPU, None, deterministic=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 1)])
def test_attention_has_the_same_bits_whole_in_chunks_and_as_decodes(
    heads: tuple[int, int], dtype: torch.dtype
) -> None:
    assert tiles_agree(*heads, 8, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_latent_attention_has_the_same_bits_too(dtype: torch.dtype) -> None:
    assert tiles_agree(4, 1, 40, dtype, latent_rank=32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [3, 16, 48])
def test_attention_equals_plain_attention(block: int, dtype: torch.dtype) -> None:
    """A decode of 150 tokens, one of 5, and a chunk of 70 at the end of 140; blocks in disorder."""
    lengths, counts, dim = [150, 5, 140], [1, 1, 70], 8
    keys = [random_rows(n, 2, dim, dtype=dtype) for n in lengths]
    values = [random_rows(n, 2, dim, dtype=dtype).flip(0) for n in lengths]
    queries = [random_rows(n, 4, dim, dtype=dtype) for n in counts]
    sizes = [-(-n // block) for n in lengths]
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(1))
    tables = [t.tolist() for t in torch.split(order, sizes)]
    cache = torch.zeros(4, len(order) + 1, block, dim, dtype=dtype)
    slots = [
        torch.tensor([t[p // block] * block + p % block for p in range(n)])
        for t, n in zip(tables, lengths, strict=True)
    ]
    for own, key, value in zip(slots, keys, values, strict=True):
        flat = cache.view(4, -1, dim)
        flat[:2, own], flat[2:, own] = key.transpose(0, 1), value.transpose(0, 1)
    short = tables[1] + [len(order)] * (sizes[0] - sizes[1])
    visible = torch.arange(sizes[0] * block) < torch.tensor([[150], [5]])
    batch = AttentionBatch(
        torch.cat([own[-n:] for own, n in zip(slots, counts, strict=True)]),
        (DecodeGroup(0, 2, torch.tensor([*tables[0], *short]), visible),),
        (PrefillChunk(2, 72, 140, torch.tensor(tables[2]), chunk_mask(70, 70, CPU)),),
        (Workspace(dtype, CPU),),
        ComputeThreads(),
    )
    new_keys, new_values = (
        torch.cat([x[-n:] for x, n in zip(every, counts, strict=True)]) for every in (keys, values)
    )
    found = attend_tiles(torch.cat(queries), new_keys, new_values, cache, batch)
    expected = torch.cat([plain(q, k, v) for q, k, v in zip(queries, keys, values, strict=True)])
    assert found.dtype == dtype
    limit = 1e-5 if dtype == torch.float32 else 0.02
    assert (found.double() - expected).abs().max() < limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [16, 33, 1400], ids=["padded", "odd", "packed"])
def test_expert_outputs_have_the_same_bits_in_all_batches(inner: int, dtype: torch.dtype) -> None:
    exchange = ExchangeSpec(index=0, name="mlp", in_width=24, out_width=24, expert_width=inner)
    assert pairs_agree(InvariantKernels().make, exchange, dtype, CPU)


def test_the_trial_finds_experts_that_see_few_rows() -> None:
    class Odd(BlockExperts):
        def compute(self, inputs: Tensor, pair_input: Tensor, pair_slot: Tensor) -> Tensor:
            found = super().compute(inputs, pair_input, pair_slot)
            counts = torch.bincount(pair_slot)[pair_slot]
            return torch.where((counts == 2).unsqueeze(1), found * 1.25, found)

    assert not pairs_agree(Odd, SWIGLU, torch.float32, CPU)


def test_experts_fall_back_to_a_loop_or_are_refused() -> None:
    tried = []

    def agree(*arguments: object) -> bool:
        tried.append(arguments)
        return len(tried) > 1

    kernels = InvariantKernels(agree)
    kernel = kernels.make(SWIGLU, torch.float32, CPU)
    assert isinstance(kernel, LoopExperts)
    kernel.resize(2)
    with pytest.raises(ConfigError, match="experts' output of a row depends"):
        InvariantKernels(lambda *_: False).make(SWIGLU, torch.float32, CPU)
    with pytest.raises(ConfigError, match="needs device cpu"):
        kernels.make(SWIGLU, torch.float32, torch.device("cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 16, 33, 128])
@pytest.mark.parametrize("activation", get_args(Activation))
def test_the_bits_of_an_activation_do_not_depend_on_its_place(
    activation: Activation, width: int, dtype: torch.dtype
) -> None:
    assert rows_agree(
        gated_activation(activation), random_rows(NUM_TRIED_ROWS, 2 * width, dtype=dtype) * 4
    )


@pytest.mark.parametrize(
    ("activation", "inner", "dtype"),
    quick_values(["gelu", "gelu_pytorch_tanh", "relu"], [33, 1400], DTYPES),
)
def test_expert_outputs_have_the_same_bits_with_all_activations(
    activation: Activation, inner: int, dtype: torch.dtype
) -> None:
    exchange = replace(SWIGLU, expert_width=inner, activation=activation)
    assert pairs_agree(InvariantKernels().make, exchange, dtype, CPU)
