"""Attention sublayer of a layer on a GPU, with fused kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from workers.model.attention_sublayer import (
    DenseProjections,
    HeadAttention,
    RoutedProjections,
    SublayerOutput,
    SublayerSteps,
    TorchAttentionSublayer,
    staged_steps,
)
from workers.model.cuda.attention import attend_written
from workers.model.layers import LayerContext
from workers.model.routing import Router, Routes, Routing

if TYPE_CHECKING:
    from workers.cuda.routing import RoutingParams


class CudaAttention:
    """Attention from projected rows to attended values with GPU kernels, or with torch for latent
    attention. Results differ from those of ``HeadAttention`` only in the order of sums."""

    def __init__(self, attention: HeadAttention) -> None:
        self._attention = attention

    def attend_rows(self, rows: Tensor, cache: Tensor, context: LayerContext) -> Tensor:
        """Attend from projected rows; see ``RowAttention.attend_rows``."""
        from workers.cuda.heads import prepare_heads

        shape, batch = self._attention.shape, self._attention.batch(context)
        if shape.latent_rank is not None:
            return self._attention.attend_rows(rows, cache, context)
        heads = prepare_heads(
            rows,
            shape.num_heads,
            self._attention.qk_norm,
            shape.eps,
            shape.clip,
            (context.cos, context.sin),
            cache,
            batch.slot_mapping,
        )
        keys, values = torch.split(heads.keys_values, shape.num_kv_heads, 1)
        return attend_written(heads.queries, keys, values, cache, batch)


class CudaAttentionSublayer(CudaAttention):
    """Attention sublayer with GPU kernels. Results differ from those of ``TorchAttentionSublayer``
    only in the order of sums."""

    def __init__(self, half: TorchAttentionSublayer) -> None:
        super().__init__(half)
        self._half = half

    def forward(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> SublayerSteps:
        """Run the sublayer on hidden states [T, H]; see ``AttentionSublayer``."""
        from workers.cuda.norms import norm

        half, parts = self._half, self._half.projections
        if not isinstance(parts, DenseProjections):
            return (yield from staged_steps(self, half.shape, parts, hidden, cache, context))
        rows = context.multiply(parts.qkv, norm(hidden, half.norm1, half.shape.eps))
        projected = context.multiply(parts.output, self.attend_rows(rows, cache, context))
        return self.leave(hidden, projected, context)

    def enter(self, hidden: Tensor, context: LayerContext) -> tuple[Tensor, Routes]:
        """Run the stage before attention, only for routed projections: first norm, router."""
        from workers.cuda.norms import norm

        parts = self._half.projections
        assert isinstance(parts, RoutedProjections)
        normed = norm(hidden, self._half.norm1, self._half.shape.eps)
        return normed, _route(parts.router, normed, context)

    def leave(self, hidden: Tensor, projected: Tensor, context: LayerContext) -> SublayerOutput:
        """Run the stage after attention: residual sum, second norm, router."""
        from workers.cuda.norms import sum_and_norm

        half = self._half
        hidden, normed = sum_and_norm(hidden, projected, half.norm2, half.shape.eps)
        routes = None if half.router is None else _route(half.router, normed, context)
        return SublayerOutput(hidden, normed, routes)


def _route(router: Router, rows: Tensor, context: LayerContext) -> Routes:
    """Route rows with a GPU kernel, or with ``Router.route`` if experts are in groups."""
    from workers.cuda.routing import choose

    routing, recorder = router.routing, context.attention.recorder
    if routing.top_groups != routing.num_groups:
        return router.route(rows, recorder)
    logits = router.linear(rows.float() if routing.has_float32_logits else rows)
    dtype = torch.float32 if routing.has_float32_weights else rows.dtype
    ids, weights = choose(logits, choice_of(routing), router.correction, dtype)
    if recorder is not None:
        recorder.router(routing.bank, logits, ids, weights)
    return Routes(routing.bank, ids, weights)


def choice_of(routing: Routing) -> RoutingParams:
    """Return the parameters of the GPU routing kernel for a router without expert groups."""
    from workers.cuda.routing import RoutingParams

    return RoutingParams(
        top_k=routing.top_k,
        scoring="softmax" if routing.scoring == "float32_softmax" else routing.scoring,
        is_normed=routing.is_normed,
        least_sum=routing.least_sum,
        scale=routing.scale if routing.has_float32_weights else 1.0,
    )
