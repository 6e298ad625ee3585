"""Base class of hybrid families: banks, names of tensors, layers."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from workers.model.attention_sublayer import HeadAttention
from workers.model.config import DeltaNetSpec, ModelConfig, TensorPart
from workers.model.delta_net import DeltaNet
from workers.model.families.base import Family, Loader
from workers.model.families.hybrid.layers import (
    Float32Norm,
    GatedAttention,
    HybridLayer,
    Mixer,
    RecurrentMixer,
)
from workers.model.families.hybrid.settings import HybridExperts
from workers.model.families.parts import (
    attention_shape,
    head_norm_parts,
    mlp_parts,
    norm_parts,
    part,
    projection_parts,
)
from workers.model.layers import Norm
from workers.model.rope import rotation_order
from workers.model.routing import Router


class HybridFamily(Family):
    def __init__(self, config: ModelConfig, experts: HybridExperts, has_bias: bool) -> None:
        """``has_bias``: whether q, k, v and o have biases."""
        super().__init__(config, experts.routed.banks(config))
        self.experts = experts
        self._has_bias = has_bias

    @abstractmethod
    def delta_parts(self, prefix: str, spec: DeltaNetSpec) -> dict[str, TensorPart]:
        """Return the input projections of Gated DeltaNet by short name, in stacking order."""

    def delta_order(self, spec: DeltaNetSpec) -> Tensor | None:
        """Return the order of the stacked rows that ``DeltaNet`` expects; None: unchanged."""
        return None

    def layer_parts(self, layer: int) -> dict[str, TensorPart]:
        """Return a layer's tensors; ``gate``, ``up``, ``down``: dense MLP or shared expert."""
        config, own = self.config, self.experts
        prefix, width = f"{self.prefix}.layers.{layer}", config.hidden_size
        parts = norm_parts(prefix, config) | self._mixer_parts(prefix, layer)
        if not own.routed.is_in(layer):
            return parts | mlp_parts(f"{prefix}.mlp", width, own.dense_width)
        return {
            **parts,
            **mlp_parts(f"{prefix}.mlp.shared_expert", width, own.shared_width),
            "shared_gate": part(f"{prefix}.mlp.shared_expert_gate.weight", 1, width),
            "router": part(f"{prefix}.mlp.gate.weight", own.routed.num_experts, width),
        }

    def make_layer(self, layer: int, loader: Loader) -> HybridLayer:
        spec = self.config.delta_net
        is_recurrent = spec is not None and layer in spec.layers
        is_sparse = self.experts.routed.is_in(layer)
        return HybridLayer(
            mixer=self._recurrent(loader) if is_recurrent else self._attention(loader),
            norm1=self._norm(loader, "norm1"),
            norm2=self._norm(loader, "norm2"),
            mlp=loader.mlp("gate", "up", "down", self.config.activation),
            gate=loader.router("shared_gate") if is_sparse else None,
            router=self._router(layer, loader) if is_sparse else None,
        )

    def final_norm(self, outer: Loader) -> Norm:
        return self._norm(outer, "norm")

    def _mixer_parts(self, prefix: str, layer: int) -> dict[str, TensorPart]:
        """Return the tensors of a layer's attention (``q``: queries, gates by head) or DeltaNet."""
        config, spec = self.config, self.config.delta_net
        width = config.hidden_size
        if spec is not None and layer in spec.layers:
            name = f"{prefix}.linear_attn"
            heads, values = spec.num_value_heads, spec.num_value_heads * spec.value_dim
            return {
                **self.delta_parts(name, spec),
                "conv": part(f"{name}.conv1d.weight", spec.conv_width, 1, spec.kernel),
                "rate": part(f"{name}.A_log", heads),
                "time": part(f"{name}.dt_bias", heads),
                "inner_norm": part(f"{name}.norm.weight", spec.value_dim),
                "o": part(f"{name}.out_proj.weight", width, values),
            }
        name = f"{prefix}.self_attn"
        projections = projection_parts(name, config, self._has_bias, has_gates=True)
        return head_norm_parts(name, config) | projections

    def _attention(self, loader: Loader) -> Mixer:
        config = self.config
        shape = attention_shape(config)
        heads = HeadAttention(shape=shape, attend=loader.attend)
        places = rotation_order(config.rope)
        return GatedAttention(
            heads=loader.blocks.heads(heads, loader.dtype),
            shape=shape,
            project=loader.linear("q", "k", "v", order=_gated_order(config)),
            q_norm=self._norm(loader, "q_norm", places),
            k_norm=self._norm(loader, "k_norm", places),
            output=loader.linear("o"),
        )

    def _recurrent(self, loader: Loader) -> Mixer:
        spec = self.config.delta_net
        assert spec is not None
        names = tuple(self.delta_parts("", spec))
        net = DeltaNet(
            spec=spec,
            conv=loader.tensor("conv").squeeze(1).float().T.contiguous(),
            rate=-loader.tensor("rate", dtype=torch.float32).exp(),
            bias=loader.tensor("time", dtype=torch.float32),
            norm=loader.tensor("inner_norm"),
            eps=self.config.rms_norm_eps,
        )
        return RecurrentMixer(
            project=loader.linear(*names, order=self.delta_order(spec)),
            mix=loader.blocks.delta_net(net),
            output=loader.linear("o"),
        )

    def _router(self, layer: int, loader: Loader) -> Router:
        own = self.experts
        routing = own.routed.routing(layer, "softmax", is_normed=own.norm_topk_prob)
        return Router(routing=routing, linear=loader.router("router"))

    def _norm(self, loader: Loader, name: str, order: Tensor | None = None) -> Norm:
        """Load a float32 norm with weight 1 + the stored weight, reordered by ``order``."""
        weight = 1 + loader.tensor(name).float()
        if order is not None:
            weight = weight.index_select(0, order.to(weight.device))
        return Float32Norm(loader.blocks.norm(weight, self.config.rms_norm_eps))


def _gated_order(config: ModelConfig) -> Tensor:
    """Return the order of q_proj, k_proj, v_proj rows as queries, keys, values, gates, int64.

    q_proj stores each head's query before its gate. Queries and keys get ``rotation_order``.
    """
    dim, places = config.head_dim, rotation_order(config.rope)
    queries = torch.arange(config.num_heads).unsqueeze(1) * 2 * dim
    keys = 2 * config.num_heads * dim + torch.arange(config.num_kv_heads).unsqueeze(1) * dim
    values = keys + config.num_kv_heads * dim + torch.arange(dim)
    gates = queries + dim + torch.arange(dim)
    parts = (queries + places, keys + places, values, gates)
    return torch.cat([rows.flatten() for rows in parts])
