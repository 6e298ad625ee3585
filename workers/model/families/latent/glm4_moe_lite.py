"""GLM-4.7-Flash: the latent attention of DeepSeek-V3, the experts of GLM-4.5.

The checkpoint has prediction layers (MTP) after the last layer; only the first can be loaded.

Source: checkpoint layout and math as in transformers ``models/glm4_moe_lite``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cluster.core.errors import CheckpointError
from workers.model.families.config_reader import ConfigReader, Defaults
from workers.model.families.grouped_experts import GroupDefaults, GroupedExperts
from workers.model.families.latent.attention import LatentAttention, LatentDefaults
from workers.model.families.latent.family import LatentFamily

_DEFAULTS = Defaults(
    vocab_size=154880,
    hidden_size=2048,
    num_layers=47,
    max_positions=202752,
    rms_norm_eps=1e-5,
    eos=(1,),
)
_ATTENTION = LatentDefaults(num_heads=20, query_rank=768, plain_dim=192, value_dim=256)
_EXPERTS = GroupDefaults(
    num_experts=64,
    top_k=4,
    num_shared_experts=1,
    expert_width=1536,
    dense_width=10240,
    norm_topk_prob=True,
    scaling_factor=1.8,
)
_KINDS = ("dense", "sparse")


def family(config: Mapping[str, Any]) -> LatentFamily:
    """Return the model that ``config`` describes. Raises ``CheckpointError`` if unsupported."""
    settings = ConfigReader(config)
    settings.architecture("Glm4MoeLiteForCausalLM")
    settings.only("scoring_func", "sigmoid")
    settings.only("topk_method", "noaux_tc")
    num_layers = settings.integer("num_hidden_layers", default=_DEFAULTS.num_layers)
    sparse = _sparse_layers(settings, num_layers)
    experts = GroupedExperts.read(settings, _EXPERTS, num_layers, sparse_layers=sparse)
    attention = LatentAttention.read(settings, _ATTENTION)
    has_neighbours = settings.flag("rope_interleave", True, null=False)
    defaults = replace(_DEFAULTS, rotates_neighbours=has_neighbours)
    shared = attention.config(settings, "glm4_moe_lite", defaults)
    return LatentFamily(shared, attention, experts)


def _sparse_layers(settings: ConfigReader, num_layers: int) -> tuple[int, ...]:
    """Return the layers with experts, from ``mlp_layer_types``; default: all but the first."""
    settings.only("first_k_dense_replace", 1)
    kinds = settings.value("mlp_layer_types", default=["dense"] + ["sparse"] * (num_layers - 1))
    if not isinstance(kinds, list) or len(kinds) != num_layers or not set(kinds) <= set(_KINDS):
        raise CheckpointError(
            f"config.json: mlp_layer_types {kinds!r} must name {' or '.join(_KINDS)} for each of "
            f"the {num_layers} layers"
        )
    if "sparse" not in kinds:
        raise CheckpointError(
            f"config.json: mlp_layer_types {kinds!r} leaves no layer with experts"
        )
    return tuple(i for i, kind in enumerate(kinds) if kind == "sparse")
