"""Layers of hybrid families: gated attention or Gated DeltaNet, then experts and a gated MLP.

All norms except the one in Gated DeltaNet are computed in float32. The checkpoint stores their
weights minus 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.model.attention_sublayer import AttentionShape, RowAttention
from workers.model.delta_net import Mix
from workers.model.layers import (
    Dispatch,
    LayerContext,
    LayerSteps,
    Linear,
    Mlp,
    Norm,
    row_sigmoid,
)
from workers.model.routing import Router

Mixer = Callable[[Tensor, Tensor, LayerContext], Tensor]
"""Attention or Gated DeltaNet of a layer: normed rows [T, H], cache, context -> [T, H]."""


class Float32Norm:
    """Norm of rows in the model dtype, computed in float32 and rounded once."""

    __slots__ = ("_norm",)

    def __init__(self, norm: Norm) -> None:
        """``norm``: a norm with a float32 weight."""
        self._norm = norm

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise [.., width]; does not modify x."""
        rows = x.reshape(-1, x.shape[-1]).to(torch.float32, copy=True)
        return self._norm(rows).to(x.dtype).view(x.shape)


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedAttention:
    """Attention with a sigmoid gate on its outputs, before the output projection."""

    heads: RowAttention
    shape: AttentionShape
    project: Linear
    """Input projection, H -> (2A + 2K) * D: rows of q, k, v, then gates [A * D]."""
    q_norm: Norm
    """Norm of each query head, [.., D]; ``k_norm`` is the norm of each key head."""
    k_norm: Norm
    output: Linear
    """Output projection, A * D -> H."""

    def __call__(self, normed: Tensor, cache: Tensor, context: LayerContext) -> Tensor:
        """Compute gated attention of normed rows: [T, H] -> [T, H]; see ``Mixer``."""
        shape = self.shape
        queries, values = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        widths = [queries, values, values, queries]
        q, k, v, gates = torch.split(context.multiply(self.project, normed), widths, 1)
        normed_heads = (
            norm(part.reshape(len(normed), -1, shape.head_dim)).flatten(1)
            for norm, part in ((self.q_norm, q), (self.k_norm, k))
        )
        attended = self.heads.attend_rows(torch.cat((*normed_heads, v), 1), cache, context)
        return context.multiply(self.output, attended * row_sigmoid(gates))


@dataclass(frozen=True, kw_only=True, slots=True)
class RecurrentMixer:
    """Gated DeltaNet (linear attention with a recurrent state) with its projections."""

    project: Linear
    """Input projection, H -> ``DeltaNet.row_width``."""
    mix: Mix
    output: Linear
    """Output projection, V * D -> H."""

    def __call__(self, normed: Tensor, cache: Tensor, context: LayerContext) -> Tensor:
        """Compute Gated DeltaNet of normed rows: [T, H] -> [T, H]; see ``Mixer``."""
        states = context.attention.states
        assert states is not None, "the model has recurrent states"
        mixed = self.mix(context.multiply(self.project, normed), cache, states)
        return context.multiply(self.output, mixed)


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridLayer:
    """h = x + mixer(norm1(x)); n = norm2(h); h + experts(n) + gate(n) * mlp(n), or h + mlp(n)."""

    mixer: Mixer
    norm1: Norm
    norm2: Norm
    mlp: Mlp
    """Shared expert of a layer with routed experts, or MLP of a layer without routed experts."""
    gate: Linear | None
    """Product H -> 1: sigmoid gate of the shared expert; None without routed experts."""
    router: Router | None
    """Router of the routed experts; None in a layer without routed experts."""

    def forward(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> LayerSteps:
        """Run the layer, see ``Layer``; the shared expert runs while routed experts compute."""
        hidden = hidden + self.mixer(self.norm1(hidden), cache, context)
        normed = self.norm2(hidden)
        if self.router is None:
            return hidden.add_(context.apply(self.mlp, normed))
        routes = self.router.route(normed, context.attention.recorder)
        yield Dispatch(routes.bank, 0, normed, routes.topk_ids, routes.topk_weights)
        assert self.gate is not None, "a layer with experts has a shared one"
        shared = context.apply(self.mlp, normed) * row_sigmoid(self.gate(normed))
        routed = yield
        return hidden.add_(routed + shared)
