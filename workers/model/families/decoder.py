"""The decoder layer of most families: the attention sublayer, then experts, an MLP, or both."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from workers.model.attention_sublayer import (
    AttentionSublayer,
    DenseProjections,
    TorchAttentionSublayer,
)
from workers.model.config import ModelConfig
from workers.model.families.base import Loader
from workers.model.families.parts import attention_shape, rotation_rows
from workers.model.layers import Dispatch, LayerContext, LayerSteps, Mlp
from workers.model.routing import Router


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderLayer:
    """Layer: h = x + attention(norm1(x)); n = norm2(h); h + experts(n), h + mlp(n), or both."""

    half: AttentionSublayer
    mlp: Mlp | None = None
    """MLP of a layer without routed experts, or shared experts of a layer with routed experts."""
    bias: Tensor | None = None
    """[H]: bias, added once per row to the weighted sum of routed experts; None: no bias."""

    def forward(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> LayerSteps:
        """Run the layer, see ``Layer``; the MLP is computed while the routed experts run."""
        half = yield from self.half.forward(hidden, cache, context)
        if half.routes is None:
            assert self.mlp is not None, "a layer has an MLP or routed experts"
            return half.hidden.add_(context.apply(self.mlp, half.normed))
        routes = half.routes
        yield Dispatch(routes.bank, 0, half.normed, routes.topk_ids, routes.topk_weights)
        other = self.bias if self.mlp is None else context.apply(self.mlp, half.normed)
        routed = yield
        return half.hidden.add_(routed if other is None else routed + other)


def dense_attention_layer(
    config: ModelConfig,
    loader: Loader,
    *,
    router: Router | None,
    qk_norm: Tensor | None = None,
    clip: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> DecoderLayer:
    """Load a decoder layer whose attention projections are not routed to experts, from the usual
    short names of its tensors.

    ``gate``, ``up`` and ``down``, if present, are the layer's MLP; ``router`` None: no experts.
    ``qk_norm``: see ``HeadAttention``, but with elements in the checkpoint's order.
    """
    order = rotation_rows(config)
    if qk_norm is not None and order is not None:
        rows = order[: qk_norm.numel()].to(qk_norm.device)
        qk_norm = qk_norm.flatten().index_select(0, rows).view_as(qk_norm)
    half = TorchAttentionSublayer(
        shape=attention_shape(config, clip=clip, window=window),
        norm1=loader.tensor("norm1"),
        projections=DenseProjections(
            qkv=loader.linear("q", "k", "v", order=order), output=loader.linear("o")
        ),
        qk_norm=qk_norm,
        norm2=loader.tensor("norm2"),
        router=router,
        attend=loader.attend,
        sinks=sinks,
    )
    has_mlp = "gate" in loader.parts
    mlp = loader.mlp("gate", "up", "down", config.activation) if has_mlp else None
    return DecoderLayer(half=loader.blocks.sublayer(half), mlp=mlp)
