"""The kernels of an attention half, against the half that torch computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from tests.harness.tiers import quick_rows, quick_values
from tests.workers.cuda.device import DEVICE
from workers.cuda.norms import norm, sum_and_norm
from workers.cuda.routing import RoutingParams, choose
from workers.model import fp8
from workers.model.attention_sublayer import (
    AttentionShape,
    DenseProjections,
    TorchAttentionSublayer,
)
from workers.model.cuda.cuda_sublayer import CudaAttentionSublayer, choice_of
from workers.model.layers import Linear, rms_norm
from workers.model.routing import Router, Routing

pytestmark = pytest.mark.heavy

DTYPES = [torch.float32, torch.bfloat16]
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 0.04}
"""Of numbers of some units: a last bit of bfloat16, as sums have another order."""
BLOCK, BLOCKS = 4, 5


def drawn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


def half(
    shape: AttentionShape, qk_norm: Tensor | None, seen: list[tuple[Tensor, ...]]
) -> TorchAttentionSublayer:
    """One whose attention notes what it is given."""
    width = shape.num_heads * shape.head_dim
    nothing = torch.zeros(1, 1)

    def attend(queries: Tensor, keys: Tensor, values: Tensor | None, *_: object) -> Tensor:
        assert values is not None
        seen.append((queries.clone(), keys.clone(), values.clone()))
        return queries.reshape(-1, width)

    return TorchAttentionSublayer(
        shape=shape,
        norm1=nothing,
        projections=DenseProjections(qkv=Linear(nothing), output=Linear(nothing)),
        qk_norm=qk_norm,
        norm2=nothing,
        router=None,
        attend=attend,
    )


@pytest.mark.parametrize(
    ("kind", "clip", "dtype"), quick_values(["none", "head", "width"], [None, 0.7], DTYPES)
)
@pytest.mark.parametrize(
    "heads", quick_rows({(6, 2, 24)}, [(4, 4, 8), (6, 2, 24), (3, 1, 64)]), ids=str
)
def test_heads_are_those_of_torch_and_in_the_cache(
    heads: tuple[int, int, int],
    kind: Literal["none", "head", "width"],
    clip: float | None,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_heads, num_kv_heads, dim = heads
    shape = AttentionShape(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=dim, eps=1e-5, clip=clip
    )
    weight = drawn(num_heads + num_kv_heads, dim, dtype=dtype, seed=1)
    qk_norm = {"none": None, "head": weight, "width": weight.flatten()}[kind]
    rows = drawn(7, (num_heads + 2 * num_kv_heads) * dim, dtype=dtype, seed=2)
    waves = drawn(7, 2, dim, dtype=dtype, seed=3)
    slots = torch.tensor([3, 19, 0, 4, 7, 11, 12], device=DEVICE)
    cache = torch.full((2 * num_kv_heads, BLOCKS, BLOCK, dim), torch.nan, dtype=dtype).to(DEVICE)
    batch = SimpleNamespace(slot_mapping=slots)
    context: Any = SimpleNamespace(
        cos=waves[:, 0].unsqueeze(1), sin=waves[:, 1].unsqueeze(1), within=lambda _: batch
    )
    seen: list[tuple[Tensor, ...]] = []
    described = half(shape, qk_norm, seen)
    described.attend_rows(rows, cache, context)
    monkeypatch.setattr("workers.model.cuda.cuda_sublayer.attend_written", described.attend)
    CudaAttentionSublayer(described).attend_rows(rows, cache, context)
    for want, got in zip(*seen, strict=True):
        assert got.shape == want.shape
        assert (got.float() - want.float()).abs().max() <= LIMITS[dtype]
    written = cache.view(2 * num_kv_heads, -1, dim)
    _, keys, values = seen[1]
    keys_values = torch.cat((keys, values), 1)
    assert torch.equal(written[:, slots].transpose(0, 1), keys_values)
    assert written.isnan().all(2).sum() == 2 * num_kv_heads * (BLOCKS * BLOCK - 7)
    codes = torch.full((*cache.shape[:3], dim + 1), 7, dtype=fp8.ROW_DTYPE, device=DEVICE)
    CudaAttentionSublayer(described).attend_rows(rows, codes, context)
    written = codes.view(2 * num_kv_heads, -1, dim + 1)
    assert torch.equal(written[:, slots].transpose(0, 1), fp8.encode(keys_values))
    assert (written == 7).all(2).sum() == 2 * num_kv_heads * (BLOCKS * BLOCK - 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 200])
def test_norms_are_those_of_torch(width: int, dtype: torch.dtype) -> None:
    x, other = (drawn(5, width, dtype=dtype, seed=seed) for seed in (1, 2))
    weight = drawn(width, dtype=dtype, seed=3)
    total, normed = sum_and_norm(x, other, weight, 1e-5)
    assert torch.equal(total, x + other)
    for got, rows in ((normed, total), (norm(x, weight, 1e-5), x)):
        want = rms_norm(rows.clone(), weight, 1e-5)
        assert (got.float() - want.float()).abs().max() <= LIMITS[dtype]
    assert norm(x[:0], weight, 1e-5).shape == (0, width)


PLAIN: dict[str, Any] = {"bank": 0, "num_experts": 24, "top_k": 5, "scoring": "softmax"}
ROUTINGS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "of best": {"scoring": "softmax_of_best"},
    "normed": {"is_normed": True, "least_sum": 0.5},
    "sigmoid": {"scoring": "sigmoid", "is_normed": True, "scale": 2.5},
    "float32_softmax": {"scoring": "float32_softmax", "scale": 16.0},
    "one": {"top_k": 1},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("kind", "has_correction"),
    [*((kind, False) for kind in ROUTINGS), *((kind, True) for kind in ("normed", "sigmoid"))],
)
def test_experts_are_those_of_torch(kind: str, has_correction: bool, dtype: torch.dtype) -> None:
    routing = Routing(**(PLAIN | ROUTINGS[kind]))
    correction = drawn(24, dtype=torch.float32, seed=4) / 10 if has_correction else None
    # Products of these are exact, so both have the same logits.
    rows = torch.eye(24, dtype=dtype, device=DEVICE)
    weight = drawn(24, 24, dtype=dtype, seed=5)
    kind_of = torch.float32 if routing.has_float32_logits else dtype
    linear = Linear(weight.to(kind_of), may_pack=False)
    want = Router(routing=routing, linear=linear, correction=correction).route(rows, None)
    ids, weights = choose(
        linear(rows.to(kind_of)), choice_of(routing), correction, want.topk_weights.dtype
    )
    if dtype == torch.float32:  # bfloat16 has equal logits, of which either may come first
        assert torch.equal(ids, want.topk_ids)
    assert weights.dtype == want.topk_weights.dtype
    assert (weights.float() - want.topk_weights.float()).abs().max() <= 0.01
    for mine, other in zip(ids.tolist(), want.topk_ids.tolist(), strict=True):
        assert len(set(mine)) == routing.top_k
        assert len(set(mine) - set(other)) <= (0 if dtype == torch.float32 else 1)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_a_row_of_nan_has_different_experts_and_no_finite_weight() -> None:
    choice = RoutingParams(top_k=5, scoring="softmax", is_normed=True, least_sum=0.0, scale=1.0)
    logits = drawn(3, 24, dtype=torch.float32)
    logits[1] = torch.nan
    ids, weights = choose(logits, choice, None, torch.float32)
    assert weights.isnan().all(1).tolist() == [False, True, False]
    assert len(set(ids[1].tolist())) == 5
    assert 0 <= int(ids.min()) <= int(ids.max()) < 24
