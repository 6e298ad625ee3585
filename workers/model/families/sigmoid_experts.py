"""Experts that a sigmoid router chooses in groups, beside shared experts and dense first layers.

Shared experts and dense layers belong to the attention worker, routed experts to the banks.

Source: DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), section 2.1.2; as in dots.llm1, GLM-4.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cluster.core.errors import CheckpointError
from workers.model.config import BankSpec, ModelConfig, TensorPart
from workers.model.families.base import Loader
from workers.model.families.parts import mlp_banks, mlp_parts, part
from workers.model.routing import Router, Routing


@dataclass(frozen=True, kw_only=True, slots=True)
class SigmoidExperts:
    """The experts and MLPs of all layers, as ``config.json`` describes them."""

    num_experts: int
    """E: routed experts of a layer."""
    top_k: int
    expert_width: int
    """I: inner width of a routed expert."""
    num_shared_experts: int
    """Experts that see every token; they are one MLP of so many times the width."""
    dense_width: int
    """Inner width of the MLP of a dense layer."""
    num_dense_layers: int
    """Layers before the first one with experts."""
    num_groups: int
    """Groups of neighbouring experts."""
    top_groups: int
    """Groups that a token's experts come from."""
    norm_topk_prob: bool
    """Weights of the chosen experts are scaled to sum 1."""
    scaling_factor: float
    """Multiplies the weights last."""

    def check(self, num_layers: int) -> None:
        """Raise ``CheckpointError`` unless every token finds its experts in the groups it may use,
        and some layer has experts.
        """
        size = self.num_experts // self.num_groups
        if self.num_experts % self.num_groups or (self.num_groups > 1 and size < 2):
            raise CheckpointError(
                f"config.json: n_routed_experts {self.num_experts} must be a multiple of "
                f"n_group {self.num_groups}, with at least 2 experts in a group"
            )
        if self.top_groups > self.num_groups:
            raise CheckpointError(
                f"config.json: topk_group {self.top_groups} exceeds n_group {self.num_groups}"
            )
        if self.top_k > self.top_groups * size:
            raise CheckpointError(
                f"config.json: num_experts_per_tok {self.top_k} exceeds the "
                f"{self.top_groups * size} experts of topk_group {self.top_groups} groups"
            )
        if self.num_dense_layers >= num_layers:
            raise CheckpointError(
                f"config.json: first_k_dense_replace {self.num_dense_layers} leaves no layer with "
                f"experts of num_hidden_layers {num_layers}"
            )

    def banks(self, config: ModelConfig) -> tuple[BankSpec, ...]:
        """One for each layer that is not dense."""
        return mlp_banks(
            config,
            range(self.num_dense_layers, config.num_layers),
            num_experts=self.num_experts,
            top_k=self.top_k,
            expert_width=self.expert_width,
            float32_weights=True,
        )

    def parts(self, layer: int, width: int) -> dict[str, TensorPart]:
        """Tensors of a layer's router, and of the dense MLP or the shared experts: ``gate``, ``up``
        and ``down``.
        """
        prefix = f"model.layers.{layer}.mlp"
        if layer < self.num_dense_layers:
            return mlp_parts(prefix, width, self.dense_width)
        shared = self.expert_width * self.num_shared_experts
        return {
            "router": part(f"{prefix}.gate.weight", self.num_experts, width),
            "correction": part(f"{prefix}.gate.e_score_correction_bias", self.num_experts),
            **mlp_parts(f"{prefix}.shared_experts", width, shared),
        }

    def router(self, layer: int, loader: Loader) -> Router | None:
        """None for a dense layer."""
        if layer < self.num_dense_layers:
            return None
        routing = Routing(
            bank=layer - self.num_dense_layers,
            num_experts=self.num_experts,
            top_k=self.top_k,
            scoring="sigmoid",
            is_normed=self.norm_topk_prob,
            scale=self.scaling_factor,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
        )
        return Router(
            routing=routing,
            linear=loader.float32_linear("router"),
            correction=loader.tensor("correction", dtype=torch.float32),
        )
