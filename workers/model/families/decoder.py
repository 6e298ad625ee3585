"""The decoder layer of all families: the attention half, then experts, an MLP, or both."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from workers.model.half import Half
from workers.model.layers import Dispatch, LayerContext, LayerSteps, Mlp


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderLayer:
    """h + attention(norm1(h)), then + experts(norm2(.)) and + mlp(norm2(.)), or one of the two."""

    half: Half
    mlp: Mlp | None = None
    """The MLP of a layer without routed experts, or the shared experts of one with them."""
    bias: Tensor | None = None
    """[H]: added to the weighted sum of the routed experts, once a row."""

    def forward(self, hidden: Tensor, cache: Tensor, context: LayerContext) -> LayerSteps:
        """See ``Layer``. The MLP is computed while the routed experts work."""
        half = yield from self.half.forward(hidden, cache, context)
        if half.routes is None:
            assert self.mlp is not None, "a layer has an MLP or routed experts"
            return half.hidden.add_(self.mlp(half.normed))
        routes = half.routes
        yield Dispatch(routes.bank, 0, half.normed, routes.topk_ids, routes.topk_weights)
        other = self.bias if self.mlp is None else self.mlp(half.normed)
        routed = yield
        return half.hidden.add_(routed if other is None else routed + other)
