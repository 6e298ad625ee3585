"""Attention sublayer of a layer: all steps before the exchange with the layer's experts.

    norm, q/k/v projections, q/k norms, clip, rotation, attention, output projection, residual,
    second norm, router

``TorchAttentionSublayer`` holds the weights and parameters of one layer's sublayer, for all
families, and computes the sublayer with torch. Other implementations are made from such an object.
If attention itself is a mixture of experts (JetMoE), its exchanges are inside the sublayer.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from workers.model.attention_batch import AttentionBatch
from workers.model.latent import LatentProjections, rotate_end
from workers.model.layers import Attend, Dispatch, LayerContext, Linear, rms_norm
from workers.model.rope import rotate
from workers.model.routing import Router, Routes

QUERY_EXCHANGE, OUTPUT_EXCHANGE = 0, 1
"""Indices of the two exchanges of a bank of attention experts: query projection and output
projection (``ExchangeSpec.index``)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """Dimensions and parameters of one layer's attention."""

    num_heads: int
    """A: number of query heads."""
    num_kv_heads: int
    """K: number of key and value heads; divides A."""
    head_dim: int
    """D: elements of a head."""
    eps: float
    """Epsilon of all norms of the layer."""
    clip: float | None = None
    """Limit of the absolute values of queries and keys (after their norms) and of values; None: no
    limit."""
    window: int | None = None
    """Maximum number of positions that a row attends to: its own and the nearest ones before it.
    None: all positions up to its own."""
    scale: float | None = None
    """Factor of the attention scores; None: D ** -0.5."""
    latent_rank: int | None = None
    """For latent attention: the first ``latent_rank`` elements of the only key are also its value,
    and the other elements are rotated. None: values are separate; whole heads are rotated."""

    @property
    def value_dim(self) -> int:
        """V: elements of a head's value."""
        return self.head_dim if self.latent_rank is None else self.latent_rank


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadAttention:
    """Attention from projected rows to attended values with torch: norms of query and key heads,
    clipping, rotary embedding, attention."""

    shape: AttentionShape
    qk_norm: Tensor | None = None
    """Weight of the norm of queries and keys. [A + K, D]: one norm for each head. [(A + K) * D]:
    one norm over all query heads and one over all key heads. None: no norm."""
    attend: Attend
    sinks: Tensor | None = None
    """[A] float32: attention sink of each query head, an extra score in the softmax that has no
    value; None: no sinks."""

    def attend_rows(self, rows: Tensor, cache: Tensor, context: LayerContext) -> Tensor:
        """Attend from projected rows; see ``RowAttention.attend_rows``."""
        shape, limit, batch = self.shape, self.shape.clip, self.batch(context)
        if shape.latent_rank is not None:
            heads = rows.view(len(rows), -1, shape.head_dim)
            heads = rotate_end(heads, shape.latent_rank, context.cos, context.sin)
            return self.attend(heads[:, :-1], heads[:, -1:], None, cache, batch)
        width = (shape.num_heads + shape.num_kv_heads) * shape.head_dim
        heads, values = self._normed(rows[:, :width]), rows[:, width:]
        if limit is not None:
            heads, values = heads.clamp(-limit, limit), values.clamp(-limit, limit)
        heads = rotate(heads, context.cos, context.sin)
        return self.attend(
            heads[:, : shape.num_heads],
            heads[:, shape.num_heads :],
            values.view(len(rows), -1, shape.head_dim),
            cache,
            batch,
        )

    def batch(self, context: LayerContext) -> AttentionBatch:
        """Return the context's batch with this layer's window, sinks, scale and latent rank."""
        batch, shape = context.within(self.shape.window), self.shape
        if self.sinks is None and shape.scale is None and shape.latent_rank is None:
            return batch
        return replace(batch, sinks=self.sinks, scale=shape.scale, latent_rank=shape.latent_rank)

    def _normed(self, rows: Tensor) -> Tensor:
        """Normalise queries and keys [T, (A + K) * D] -> [T, A + K, D]."""
        shape, weight = self.shape, self.qk_norm
        if weight is not None and weight.dim() == 1:
            widths = [n * shape.head_dim for n in (shape.num_heads, shape.num_kv_heads)]
            parts = zip(torch.split(rows, widths, 1), torch.split(weight, widths), strict=True)
            rows = torch.cat([rms_norm(part, w, shape.eps) for part, w in parts], 1)
        heads = rows.view(len(rows), -1, shape.head_dim)
        if weight is not None and weight.dim() == 2:
            heads = rms_norm(heads, weight, shape.eps)
        return heads


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseProjections:
    """Query, key, value and output projections that are the same for all rows."""

    qkv: Linear
    """Query, key and value projection, H -> (A + 2K) * D: rows of q, k, v in this order."""
    output: Linear
    """Output projection, A * D -> H."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedProjections:
    """Query and output projections by experts: mixture of attention heads.

    A row uses the same top_k experts for queries and for outputs. Each expert has K query heads, so
    A is top_k * K; all experts of a row share the row's keys and values.

    Source: Zhang et al., "Mixture of Attention Heads" (2022), as in JetMoE.
    """

    router: Router
    kv: Linear
    """Key and value projection, H -> 2K * D: rows of k, then rows of v."""
    bias: Tensor
    """[H]: output bias, added once per row to the weighted sum of the experts' outputs."""


@dataclass(frozen=True, slots=True)
class SublayerOutput:
    """Output of the attention sublayer."""

    hidden: Tensor
    """[T, H]: the residual stream after attention, which the rest of the layer may modify."""
    normed: Tensor
    """[T, H]: norm of ``hidden``, the input of experts and MLP."""
    routes: Routes | None
    """Routed experts of each row; None in a layer without routed experts."""


SublayerSteps = Generator[Any, Tensor, SublayerOutput]
"""Generator that runs an attention sublayer. It yields exchanges, as ``LayerSteps`` does, only if
the sublayer's projections are routed to experts."""


class AttentionSublayer(Protocol):
    """Interface of the attention sublayer of one layer."""

    def forward(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> SublayerSteps:
        """Run the sublayer on hidden states [T, H], which may be modified; ``cache`` is the layer's
        tensor of ``KVCache``."""


class RowAttention(Protocol):
    """Interface of attention from projected rows to attended values; ``HeadAttention`` is the
    implementation with torch."""

    def attend_rows(self, rows: Tensor, cache: Tensor, context: LayerContext) -> Tensor:
        """Attend: ``rows`` with queries, keys and values [T, (A + 2K) * D] -> [T, A * D].

        In latent attention, ``rows`` has queries and one key, [T, (A + 1) * D], and the result is
        [T, A * V]. Writes keys and values to ``cache``, the layer's tensor of ``KVCache``.
        """


class SublayerStages(RowAttention, Protocol):
    """Interface of the stages of an attention sublayer whose projections are routed or latent.

    Routed projections (attention experts): ``enter``, an exchange, ``attend_rows``, an exchange,
    ``leave``. Latent projections: ``LatentProjections.project``, ``leave``; ``project`` calls
    ``attend_rows`` except for expanded rows.
    """

    def enter(self, hidden: Tensor, context: LayerContext) -> tuple[Tensor, Routes]:
        """Return the first norm of ``hidden`` [T, H], and each row's attention experts. Only for
        routed projections."""

    def leave(self, hidden: Tensor, projected: Tensor, context: LayerContext) -> SublayerOutput:
        """Turn residual stream and projected attention outputs, each [T, H], into the sublayer's
        output."""


class StagedSublayer(AttentionSublayer, SublayerStages, Protocol):
    """Interface of an attention sublayer that can run as a whole or in stages."""


def staged_steps(
    stages: SublayerStages,
    shape: AttentionShape,
    parts: RoutedProjections | LatentProjections,
    hidden: Tensor,
    cache: Tensor,
    context: LayerContext,
) -> SublayerSteps:
    """Run a sublayer with routed or latent projections, stage by stage."""
    if isinstance(parts, LatentProjections):
        projected = parts.project(stages.attend_rows, hidden, cache, context)
        return stages.leave(hidden, projected, context)
    return (yield from _routed_steps(stages, shape, parts, hidden, cache, context))


def _routed_steps(
    stages: SublayerStages,
    shape: AttentionShape,
    parts: RoutedProjections,
    hidden: Tensor,
    cache: Tensor,
    context: LayerContext,
) -> SublayerSteps:
    """Run the sublayer of a layer with attention experts.

    Attention expects the query heads that share a key head to be adjacent, so the dimensions of
    slots and heads are transposed before and after attention.
    """
    kv_heads, dim = shape.num_kv_heads, shape.head_dim
    normed, routes = stages.enter(hidden, context)
    ids, weights = routes.topk_ids, routes.topk_weights
    yield Dispatch(routes.bank, QUERY_EXCHANGE, normed, ids, weights)
    keys_values = context.multiply(parts.kv, normed)
    queries = yield
    by_head = queries.view(*ids.shape, kv_heads, dim).transpose(1, 2).flatten(1)
    attended = stages.attend_rows(torch.cat((by_head, keys_values), 1), cache, context)
    by_slot = attended.view(len(ids), kv_heads, -1, dim).transpose(1, 2).flatten(2)
    yield Dispatch(routes.bank, OUTPUT_EXCHANGE, by_slot, ids, weights)
    mixed = yield
    return stages.leave(hidden, mixed + parts.bias, context)


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchAttentionSublayer(HeadAttention):
    """Attention sublayer of one layer: its description, and its implementation with torch."""

    norm1: Tensor
    """Weight of the first norm [H]."""
    projections: DenseProjections | RoutedProjections | LatentProjections
    norm2: Tensor
    """Weight of the second norm [H]."""
    router: Router | None
    """Router of the layer's routed experts; None in a layer without routed experts."""

    def forward(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> SublayerSteps:
        """Run the sublayer on hidden states [T, H]; see ``AttentionSublayer``."""
        parts = self.projections
        if not isinstance(parts, DenseProjections):
            return (yield from staged_steps(self, self.shape, parts, hidden, cache, context))
        rows = context.multiply(parts.qkv, rms_norm(hidden, self.norm1, self.shape.eps))
        projected = context.multiply(parts.output, self.attend_rows(rows, cache, context))
        return self.leave(hidden, projected, context)

    def enter(self, hidden: Tensor, context: LayerContext) -> tuple[Tensor, Routes]:
        """Run the stage before attention, only for routed projections: first norm, router."""
        assert isinstance(self.projections, RoutedProjections)
        normed = rms_norm(hidden, self.norm1, self.shape.eps)
        return normed, self.projections.router.route(normed, context.attention.recorder)

    def leave(self, hidden: Tensor, projected: Tensor, context: LayerContext) -> SublayerOutput:
        """Run the stage after attention: residual sum, second norm, router."""
        hidden = hidden + projected
        normed = rms_norm(hidden, self.norm2, self.shape.eps)
        recorder = context.attention.recorder
        routes = None if self.router is None else self.router.route(normed, recorder)
        return SublayerOutput(hidden, normed, routes)
