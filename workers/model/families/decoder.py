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
    """h = x + attention(norm1(x)), then h + experts(norm2(h)) + mlp(norm2(h)), or one of both."""

    half: AttentionSublayer
    mlp: Mlp | None = None
    """The MLP of a layer without routed experts, or the shared experts of one with them."""
    bias: Tensor | None = None
    """[H]: bias, added once per row to the weighted sum of the routed experts."""

    def forward(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> LayerSteps:
        """See ``Layer``. The MLP is computed while the routed experts run."""
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
    """Return a layer whose projections are the same for all rows, from the usual short names of
    its tensors.

    ``gate``, ``up`` and ``down``, if present, are its MLP; ``router`` None: no experts.
    ``qk_norm``: see ``HeadAttention``, in the checkpoint's order of rows.
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
