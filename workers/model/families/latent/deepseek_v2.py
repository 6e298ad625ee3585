"""DeepSeek-V2: latent attention, experts by softmax in groups, dense first layers.

Source: checkpoint layout and math as in transformers ``models/deepseek_v2``.
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
    vocab_size=102400,
    hidden_size=4096,
    num_layers=32,
    max_positions=2048,
    rms_norm_eps=1e-6,
    rotates_neighbours=True,
    eos=(2,),
)
_ATTENTION = LatentDefaults(num_heads=32)
_EXPERTS = GroupDefaults(
    num_experts=64,
    num_experts_key="num_experts",
    num_shared_experts=2,
    expert_width=1407,
    dense_width=11008,
)


def family(config: Mapping[str, Any]) -> LatentFamily:
    """Return the model that ``config`` describes. Raises ``CheckpointError`` if unsupported."""
    settings = ConfigReader(config)
    settings.architecture("DeepseekV2ForCausalLM")
    settings.only("scoring_func", "softmax")
    settings.only("norm_topk_prob", False)
    settings.only("topk_method", "greedy", "group_limited_greedy")
    is_grouped = settings.value("topk_method") == "group_limited_greedy"
    num_layers = settings.integer("num_hidden_layers", default=_DEFAULTS.num_layers)
    experts = GroupedExperts.read(settings, _EXPERTS, num_layers, scoring="float32_softmax")
    if not is_grouped:
        experts = replace(experts, num_groups=1, top_groups=1)
    attention = LatentAttention.read(settings, _ATTENTION)
    shared = attention.config(settings, "deepseek_v2", _DEFAULTS)
    return LatentFamily(shared, attention, experts)
