"""Routed experts in groups, with shared experts that run for every token, and dense layers.

Shared experts and dense layers belong to the attention worker, routed experts to the banks.

Source: DeepSeek-AI, "DeepSeek-V3 Technical Report" (2024), section 2.1.2, and "DeepSeek-V2" (2024),
section 2.2; as in dots.llm1 and GLM-4.5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from cluster.core.errors import CheckpointError
from workers.model.config import BankSpec, ModelConfig, TensorPart
from workers.model.families.base import Loader
from workers.model.families.config_reader import ConfigReader
from workers.model.families.parts import mlp_parts, part
from workers.model.families.routed_experts import RoutedExperts
from workers.model.routing import Router


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupDefaults:
    """A model family's default settings of experts; None: ``config.json`` must have the key."""

    num_experts: int | None = None
    num_experts_key: str = "num_local_experts"
    """Key of ``config.json`` that is read if ``n_routed_experts`` is absent."""
    top_k: int | None = None
    num_shared_experts: int | None = None
    expert_width: int = 1408
    dense_width: int = 10944
    num_dense_layers: int = 0
    num_groups: int = 1
    top_groups: int = 1
    norm_topk_prob: bool = False
    scaling_factor: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedExperts:
    """Routed experts, shared experts and dense MLPs of all layers, from ``config.json``."""

    routed: RoutedExperts
    num_shared_experts: int
    """Number of shared experts, computed as one MLP of this number times an expert's width."""
    dense_width: int
    """Inner width of the MLP of a dense layer."""
    num_groups: int
    """Number of groups of consecutive experts."""
    top_groups: int
    """Number of groups from which a token's experts are selected."""
    norm_topk_prob: bool
    """Whether the weights of the selected experts are scaled to sum 1."""
    scaling_factor: float
    """Factor by which the weights of the selected experts are finally multiplied."""
    scoring: Literal["sigmoid", "float32_softmax"] = "sigmoid"
    """Function from logits to weights; for sigmoid, a bias per expert corrects the selection."""

    @classmethod
    def read(
        cls,
        settings: ConfigReader,
        defaults: GroupDefaults,
        num_layers: int,
        *,
        sparse_layers: tuple[int, ...] | None = None,
        scoring: Literal["sigmoid", "float32_softmax"] = "sigmoid",
    ) -> GroupedExperts:
        """Read the settings. ``sparse_layers`` None: all but the first ``first_k_dense_replace``.

        Raises ``CheckpointError`` naming the unsupported key.
        """
        if sparse_layers is None:
            sparse_layers = _layers_behind_dense(settings, defaults.num_dense_layers, num_layers)
        routed = RoutedExperts(
            num_experts=settings.integer(
                "n_routed_experts", defaults.num_experts_key, default=defaults.num_experts
            ),
            top_k=settings.integer("num_experts_per_tok", default=defaults.top_k),
            expert_width=settings.integer("moe_intermediate_size", default=defaults.expert_width),
            sparse_layers=sparse_layers,
        )
        found = cls(
            routed=routed,
            num_shared_experts=settings.integer(
                "n_shared_experts", default=defaults.num_shared_experts
            ),
            dense_width=settings.integer("intermediate_size", default=defaults.dense_width),
            num_groups=settings.integer("n_group", default=defaults.num_groups),
            top_groups=settings.integer("topk_group", default=defaults.top_groups),
            norm_topk_prob=settings.flag("norm_topk_prob", defaults.norm_topk_prob, null=False),
            scaling_factor=settings.real("routed_scaling_factor", defaults.scaling_factor),
            scoring=scoring,
        )
        found._check()
        return found

    def with_layer(self, layer: int) -> GroupedExperts:
        """Return a copy in which ``layer``, which follows all other layers, also has experts."""
        layers = (*(self.routed.sparse_layers or ()), layer)
        return replace(self, routed=replace(self.routed, sparse_layers=layers))

    def banks(self, config: ModelConfig) -> tuple[BankSpec, ...]:
        """Return a bank of routed experts for each layer that is not dense."""
        return self.routed.banks(config, float32_weights=True, aux_copies=0)

    def parts(self, layer: int, width: int) -> dict[str, TensorPart]:
        """Return the tensors of a layer's router and shared experts, or of its dense MLP, by short
        name: ``router``, ``correction``, ``gate``, ``up``, ``down``.
        """
        prefix = f"model.layers.{layer}.mlp"
        if not self.routed.is_in(layer):
            return mlp_parts(prefix, width, self.dense_width)
        shared = self.routed.expert_width * self.num_shared_experts
        parts = {
            "router": part(f"{prefix}.gate.weight", self.routed.num_experts, width),
            **mlp_parts(f"{prefix}.shared_experts", width, shared),
        }
        if self.scoring == "sigmoid":
            name = f"{prefix}.gate.e_score_correction_bias"
            parts["correction"] = part(name, self.routed.num_experts)
        return parts

    def router(self, layer: int, loader: Loader) -> Router | None:
        """Return the router of a layer; None for a dense layer."""
        if not self.routed.is_in(layer):
            return None
        routing = self.routed.routing(
            layer,
            self.scoring,
            is_normed=self.norm_topk_prob,
            scale=self.scaling_factor,
            num_groups=self.num_groups,
            top_groups=self.top_groups,
        )
        has_correction = "correction" in loader.parts
        return Router(
            routing=routing,
            linear=loader.float32_linear("router"),
            correction=loader.tensor("correction", dtype=torch.float32) if has_correction else None,
        )

    def _check(self) -> None:
        """Raise ``CheckpointError`` if the selected groups have too few experts for a token."""
        num_experts, top_k = self.routed.num_experts, self.routed.top_k
        size = num_experts // self.num_groups
        if num_experts % self.num_groups or (self.num_groups > 1 and size < 2):
            raise CheckpointError(
                f"config.json: n_routed_experts {num_experts} must be a multiple of "
                f"n_group {self.num_groups}, with at least 2 experts in a group"
            )
        if self.top_groups > self.num_groups:
            raise CheckpointError(
                f"config.json: topk_group {self.top_groups} exceeds n_group {self.num_groups}"
            )
        if top_k > self.top_groups * size:
            raise CheckpointError(
                f"config.json: num_experts_per_tok {top_k} exceeds the "
                f"{self.top_groups * size} experts of topk_group {self.top_groups} groups"
            )


def _layers_behind_dense(settings: ConfigReader, default: int, num_layers: int) -> tuple[int, ...]:
    num_dense = settings.integer("first_k_dense_replace", default=default, least=0)
    if num_dense >= num_layers:
        raise CheckpointError(
            f"config.json: first_k_dense_replace {num_dense} leaves no layer with experts of "
            f"num_hidden_layers {num_layers}"
        )
    return tuple(range(num_dense, num_layers))
