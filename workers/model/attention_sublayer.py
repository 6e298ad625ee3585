"""The attention half of a layer: everything before the exchange with the layer's experts.

    norm, q/k/v projections, q/k norms, clip, rotation, attention, output projection, residual,
    second norm, router

``TorchAttentionSublayer`` describes the half of one layer by weights and a few numbers, in the same
way for all families, and computes it with torch. Where attention itself is a mixture of experts
(JetMoE), its exchanges are inside the half.
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
"""``ExchangeSpec.index`` of the two exchanges of a bank of attention experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """The numbers of one layer's attention."""

    num_heads: int
    """A: query heads."""
    num_kv_heads: int
    """K: key and value heads; A is a multiple."""
    head_dim: int
    """D."""
    eps: float
    """Epsilon of all norms of the layer."""
    clip: float | None = None
    """Limit of the absolute value of queries, keys (after their norms) and values."""
    window: int | None = None
    """Positions that a row attends to, its own and those before it; None: all."""
    scale: float | None = None
    """Of scores; None: D ** -0.5."""
    latent_rank: int | None = None
    """The only key has its value in the first so many elements, and the others are rotated; None:
    values are apart, and heads are rotated whole."""

    @property
    def value_dim(self) -> int:
        """V: elements of a head's values."""
        return self.head_dim if self.latent_rank is None else self.latent_rank


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadAttention:
    """From queries, keys and values to what each row has attended to: norms of heads, clip,
    rotation, attention.
    """

    shape: AttentionShape
    qk_norm: Tensor | None = None
    """[A + K, D]: each head is normalised by itself; [(A + K) * D]: queries over all their heads,
    and keys over theirs; None: they are not normalised."""
    attend: Attend
    sinks: Tensor | None = None
    """[A] float32: see ``AttentionBatch.sinks``."""

    def attend_rows(self, rows: Tensor, cache: Tensor, context: LayerContext) -> Tensor:
        """See ``RowAttention``."""
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
        """What the layer's rows attend to."""
        batch, shape = context.within(self.shape.window), self.shape
        if self.sinks is None and shape.scale is None and shape.latent_rank is None:
            return batch
        return replace(batch, sinks=self.sinks, scale=shape.scale, latent_rank=shape.latent_rank)

    def _normed(self, rows: Tensor) -> Tensor:
        """Queries and keys [T, (A + K) * D] -> [T, A + K, D]."""
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
    """Projections that all rows share."""

    qkv: Linear
    """H -> (A + 2K) * D, rows of q, k, v in this order."""
    output: Linear
    """A * D -> H."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedProjections:
    """Projections to queries and from the attended values by experts: mixture of attention heads.

    A row's choice is made once for both exchanges. Slot j of the choice has query heads 0 .. K - 1
    of its own, so A is top_k * K, and all slots share the keys and values.

    Source: Zhang et al., "Mixture of Attention Heads" (2022), as in JetMoE.
    """

    router: Router
    kv: Linear
    """H -> 2K * D, rows of k before those of v."""
    bias: Tensor
    """[H], added to the weighted sum of the outputs, once a row."""


@dataclass(frozen=True, slots=True)
class SublayerOutput:
    """What an attention half passes to the rest of its layer."""

    hidden: Tensor
    """[T, H]: the residual stream after attention, which the rest of the layer may change."""
    normed: Tensor
    """[T, H]: its norm, the input of experts and MLP."""
    routes: Routes | None
    """None in a layer without routed experts."""


SublayerSteps = Generator[Any, Tensor, SublayerOutput]
"""Like ``LayerSteps``; yields nothing unless projections are routed."""


class AttentionSublayer(Protocol):
    """The attention half of one layer, however it is computed."""

    def forward(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> SublayerSteps:
        """hidden [T, H], which may be changed; cache is this layer's part of ``KVCache``."""


class RowAttention(Protocol):
    """Attention from projected rows to what they have attended to: ``HeadAttention`` with torch,
    or another implementation."""

    def attend_rows(self, rows: Tensor, cache: Tensor, context: LayerContext) -> Tensor:
        """Queries, keys and values [T, (A + 2K) * D] -> [T, A * D].

        Where the shape has a ``latent_rank``: queries and the key [T, (A + 1) * D] -> [T, A * V].
        Writes keys and values to ``cache``, this layer's part of ``KVCache``.
        """


class SublayerStages(RowAttention, Protocol):
    """The parts of a half that are computed one by one, as its projections are routed or latent.

    Routed: ``enter``, an exchange, ``attend_rows``, an exchange, ``leave``. Latent: a latent
    projection, which calls ``attend_rows``, then ``leave``.
    """

    def enter(self, hidden: Tensor, context: LayerContext) -> tuple[Tensor, Routes]:
        """The first norm [T, H], and the experts of the projections."""

    def leave(self, hidden: Tensor, projected: Tensor, context: LayerContext) -> SublayerOutput:
        """Residual stream and projected outputs of attention, each [T, H], to the half's output."""


class StagedSublayer(AttentionSublayer, SublayerStages, Protocol):
    """A half as a whole, and in parts."""


def staged_steps(
    stages: SublayerStages,
    shape: AttentionShape,
    parts: RoutedProjections | LatentProjections,
    hidden: Tensor,
    cache: Tensor,
    context: LayerContext,
) -> SublayerSteps:
    """A half whose projections are routed or latent, stage after stage."""
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
    """The half of a layer whose attention is a mixture of experts.

    Attention needs the query heads of one key head side by side, so the slots of a row and its
    heads are transposed before and after it.
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
    """The attention half of one layer, described, and computed with torch."""

    norm1: Tensor
    """[H]."""
    projections: DenseProjections | RoutedProjections | LatentProjections
    norm2: Tensor
    """[H]."""
    router: Router | None
    """None in a layer without routed experts."""

    def forward(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> SublayerSteps:
        """See ``AttentionSublayer``."""
        parts = self.projections
        if not isinstance(parts, DenseProjections):
            return (yield from staged_steps(self, self.shape, parts, hidden, cache, context))
        rows = context.multiply(parts.qkv, rms_norm(hidden, self.norm1, self.shape.eps))
        projected = context.multiply(parts.output, self.attend_rows(rows, cache, context))
        return self.leave(hidden, projected, context)

    def enter(self, hidden: Tensor, context: LayerContext) -> tuple[Tensor, Routes]:
        """See ``SublayerStages``."""
        assert isinstance(self.projections, RoutedProjections)
        normed = rms_norm(hidden, self.norm1, self.shape.eps)
        return normed, self.projections.router.route(normed, context.attention.recorder)

    def leave(self, hidden: Tensor, projected: Tensor, context: LayerContext) -> SublayerOutput:
        """See ``SublayerStages``."""
        hidden = hidden + projected
        normed = rms_norm(hidden, self.norm2, self.shape.eps)
        recorder = context.attention.recorder
        routes = None if self.router is None else self.router.route(normed, recorder)
        return SublayerOutput(hidden, normed, routes)
