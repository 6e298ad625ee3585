"""Reads the settings of hybrid layers in ``config.json``: kinds, Gated DeltaNet, experts."""

from __future__ import annotations

from dataclasses import dataclass

from cluster.core.errors import CheckpointError
from workers.model.config import DeltaNetSpec, ModelConfig
from workers.model.families.config_reader import ConfigReader
from workers.model.families.routed_experts import RoutedExperts

LINEAR, FULL = "linear_attention", "full_attention"
"""Kinds of layers in ``layer_types`` of ``config.json``: Gated DeltaNet, attention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridExperts:
    """Settings of routed and shared experts, and of the MLP of layers without experts."""

    routed: RoutedExperts
    shared_width: int
    """Inner width of the shared expert, which runs for every token."""
    dense_width: int
    """Inner width of the MLP of a dense layer."""
    norm_topk_prob: bool
    """Whether the weights of the selected experts are scaled to sum 1."""


def read_experts(
    settings: ConfigReader,
    *,
    sparse_layers: tuple[int, ...],
    num_experts: int,
    top_k: int,
    dense_width: int,
    norm_topk_prob: bool,
) -> HybridExperts:
    """Read experts' settings. ``num_experts`` and ``top_k`` are defaults, others are final."""
    return HybridExperts(
        routed=RoutedExperts.read(
            settings,
            num_experts=(num_experts, "num_experts"),
            top_k=(top_k, "num_experts_per_tok"),
            expert_width=(512, "moe_intermediate_size"),
            sparse_layers=sparse_layers,
        ),
        shared_width=settings.integer("shared_expert_intermediate_size", default=512),
        dense_width=dense_width,
        norm_topk_prob=norm_topk_prob,
    )


def read_delta_net(settings: ConfigReader, num_layers: int) -> DeltaNetSpec | None:
    """Read the settings of Gated DeltaNet layers; None: the model has no such layers."""
    layers = tuple(i for i, kind in enumerate(_kinds(settings, num_layers)) if kind == LINEAR)
    spec = DeltaNetSpec(
        layers=layers,
        num_key_heads=settings.integer("linear_num_key_heads", default=16),
        num_value_heads=settings.integer("linear_num_value_heads", default=32),
        key_dim=settings.integer("linear_key_head_dim", default=128),
        value_dim=settings.integer("linear_value_head_dim", default=128),
        kernel=settings.integer("linear_conv_kernel_dim", default=4),
    )
    if spec.num_value_heads % spec.num_key_heads:
        raise CheckpointError(
            f"config.json: linear_num_value_heads {spec.num_value_heads} must be a multiple of "
            f"linear_num_key_heads {spec.num_key_heads}"
        )
    return spec if layers else None


def _kinds(settings: ConfigReader, num_layers: int) -> list[str]:
    """Return the kind of each layer, from ``layer_types`` or ``full_attention_interval``."""
    interval = settings.integer("full_attention_interval", default=4)
    kinds = settings.value("layer_types")
    if kinds is None:
        kinds = [FULL if (i + 1) % interval == 0 else LINEAR for i in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or not {*kinds} <= {LINEAR, FULL}:
        raise CheckpointError(
            f"config.json: layer_types {kinds!r} must name {num_layers} layers, each {LINEAR} or "
            f"{FULL}"
        )
    if FULL not in kinds:
        raise CheckpointError(f"config.json: layer_types has no layer with {FULL}")
    return kinds


def check_activation(config: ModelConfig) -> None:
    """Raise ``CheckpointError`` for an activation that Gated DeltaNet does not support."""
    if config.activation != "silu":
        raise CheckpointError(
            f"config.json: hidden_act {config.activation!r} is not supported for "
            f"{config.model_type}: must be 'silu'"
        )
