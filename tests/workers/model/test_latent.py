"""Latent attention: rows whose keys and values are made of latent vectors, and absorbed ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count

import pytest
import torch
from torch import Tensor

from benchmarks.harness.local_engine import LocalEngine
from tests.reference.goldens import MAX_MODEL_LEN, NUM_NEW_TOKENS, Golden
from tests.workers.model.native.test_native_sublayer import (
    CASES,
    WHOLE,
    Chunk,
    in_chunks,
    make,
    serve,
)
from workers.model import latent
from workers.model.attention_sublayer import TorchAttentionSublayer
from workers.model.building_blocks import BuildingBlocks
from workers.model.latent import LatentProjections, LatentShape, TorchHeadProducts
from workers.model.layers import Linear
from workers.requests.request import Request, SamplingParams

CASE = CASES["latent"]


class Counting(TorchHeadProducts):
    """Notes the latent vectors that it expands, and the heads."""

    def __init__(self, weight: Tensor, plain_dim: int) -> None:
        super().__init__(weight, plain_dim)
        self.expanded: list[tuple[int, int]] = []

    def expand(self, latents: Tensor, first: int, last: int) -> Tensor:
        self.expanded.append((len(latents), last - first))
        return super().expand(latents, first, last)


def made(blocks: BuildingBlocks) -> tuple[TorchAttentionSublayer, LatentProjections]:
    """The half, and its projections."""
    half = make(CASE, torch.float32, blocks)
    assert isinstance(half, TorchAttentionSublayer)
    assert isinstance(half.projections, LatentProjections)
    return half, half.projections


class CountingBlocks(BuildingBlocks):
    def head_products(self, weight: Tensor, plain_dim: int) -> Counting:
        return Counting(weight, plain_dim)


@pytest.mark.parametrize("piece_bytes", [40_000, 3_000_000])
@pytest.mark.parametrize("batches", [WHOLE, in_chunks(18), [[(0, 0, 37), (2, 0, 20)], [(1, 0, 9)]]])
def test_expanded_rows_are_those_that_are_absorbed(
    monkeypatch: pytest.MonkeyPatch, batches: Sequence[Sequence[Chunk]], piece_bytes: int
) -> None:
    monkeypatch.setattr(latent, "PIECE_BYTES", piece_bytes)
    half, parts = made(CountingBlocks())
    assert isinstance(parts.heads, Counting)
    found = serve(half, CASE, torch.float32, batches)
    long = [last for batch in batches for _, first, last in batch if last - first >= 17]
    heads_of: dict[int, int] = {}
    for length, num_heads in parts.heads.expanded:
        assert num_heads == 1 or length * num_heads * (2 * 14 + 8 + 11) * 4 <= piece_bytes
        heads_of[length] = heads_of.get(length, 0) + num_heads
    assert heads_of == dict.fromkeys(long, CASE.num_heads)
    absorbed = replace(half, projections=replace(parts, can_expand=False))
    expected = serve(absorbed, CASE, torch.float32, batches)
    for own, other in zip(found, expected, strict=True):
        for tensor, wanted in zip(own, other, strict=True):
            assert torch.allclose(tensor.double(), wanted.double(), rtol=0, atol=2e-5)


def test_rows_are_expanded_from_where_that_costs_less() -> None:
    """As in DeepSeek-V3: 512 * 256 products a key, which 1088 - 320 a pair pay for."""
    shape = LatentShape(
        num_heads=128, rank=512, plain_dim=128, rotated_dim=64, value_dim=128, scale=1.0
    )
    assert (shape.query_dim, shape.cached_dim) == (192, 576)
    assert shape.min_expanded_rows == 512 * 256 // 768 + 1
    wide = replace(shape, rank=4, plain_dim=64)
    assert wide.min_expanded_rows > 0  # where making keys always costs less


def test_prompts_are_expanded_beside_decodes(golden: Callable[[str], Golden]) -> None:
    """Prompts come while others decode: the tokens are those of transformers."""
    expected = golden("deepseekv3-base")
    engine = LocalEngine(
        expected.path, dtype="float32", max_model_len=MAX_MODEL_LEN, kernels="torch"
    )
    params = SamplingParams(max_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True)
    order = sorted(range(len(expected.prompts)), key=lambda i: len(expected.prompts[i]))
    assert len(expected.prompts[order[-1]]) > 60  # more rows than pay for it
    tokens: dict[str, list[int]] = {str(i): [] for i in order}
    waiting = list(order)
    for step in count():
        if waiting and step % 3 == 0:
            i = waiting.pop(0)
            engine.add_request(
                Request(request_id=str(i), prompt=expected.prompts[i], params=params)
            )
        elif not waiting and not engine.engine.has_work:
            break
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
    assert tokens == {str(i): list(expected.greedy(i)) for i in order}


@pytest.mark.parametrize("num_rows", [1, 7])
def test_products_of_heads_are_those_of_each_head(num_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5 + 4, 6, generator=generator)
    rows = torch.randn(num_rows, 3, 5, generator=generator)
    attended = torch.randn(num_rows, 3, 6, generator=generator)
    both = TorchHeadProducts(weight, 5), latent.LinearHeadProducts(weight, 5, Linear)
    for products in both:
        absorbed, values = products.absorb(rows), products.values(attended).view(num_rows, 3, 4)
        for head in range(3):
            keys, made = weight[head, :5], weight[head, 5:]
            assert torch.allclose(absorbed[:, head], rows[:, head] @ keys, atol=1e-5)
            assert torch.allclose(values[:, head], attended[:, head] @ made.T, atol=1e-5)
    with pytest.raises(AssertionError, match="absorbed"):
        both[1].expand(rows[:, 0], 0, 1)
