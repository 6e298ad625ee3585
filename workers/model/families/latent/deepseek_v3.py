"""DeepSeek-V3, R1 and Kimi K2: latent attention, a sigmoid router in groups, dense first layers.

The checkpoint has prediction layers (MTP) after the last layer; only the first can be loaded.

Source: checkpoint layout and math as in transformers ``models/deepseek_v3``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from workers.model.families.config_reader import ConfigReader, Defaults
from workers.model.families.grouped_experts import GroupDefaults, GroupedExperts
from workers.model.families.latent.attention import LatentAttention, LatentDefaults
from workers.model.families.latent.family import LatentFamily

_DEFAULTS = Defaults(
    vocab_size=129280,
    hidden_size=7168,
    num_layers=61,
    max_positions=4096,
    rms_norm_eps=1e-6,
    eos=(1,),
)
_ATTENTION = LatentDefaults(num_heads=128)
_EXPERTS = GroupDefaults(
    num_experts=256,
    top_k=8,
    num_shared_experts=1,
    expert_width=2048,
    dense_width=18432,
    num_dense_layers=3,
    num_groups=8,
    top_groups=4,
    norm_topk_prob=True,
    scaling_factor=2.5,
)


def family(config: Mapping[str, Any]) -> LatentFamily:
    """Return the model that ``config`` describes. Raises ``CheckpointError`` if unsupported."""
    settings = ConfigReader(config)
    settings.architecture("DeepseekV3ForCausalLM")
    settings.only("scoring_func", "sigmoid")
    settings.only("topk_method", "noaux_tc")
    num_layers = settings.integer("num_hidden_layers", default=_DEFAULTS.num_layers)
    experts = GroupedExperts.read(settings, _EXPERTS, num_layers)
    attention = LatentAttention.read(settings, _ATTENTION)
    has_neighbours = settings.flag("rope_interleave", True, null=False)
    defaults = replace(_DEFAULTS, rotates_neighbours=has_neighbours)
    shared = attention.config(settings, str(config["model_type"]), defaults)
    return LatentFamily(shared, attention, experts)
