"""Qwen3.5-MoE and 3.6: the text model, alone or within a checkpoint with a vision encoder.

The vision encoder and the prediction layer (``mtp``) are not loaded. Prompts are text, for which
the rotation in sections (mrope) equals the plain rotation.

Source: checkpoint layout and math as in transformers ``models/qwen3_5_moe``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cluster.core.errors import CheckpointError
from workers.model.config import DeltaNetSpec, ModelConfig, TensorPart
from workers.model.families.config_reader import (
    AttentionHeads,
    ConfigReader,
    Defaults,
    model_config,
)
from workers.model.families.hybrid.family import HybridFamily
from workers.model.families.hybrid.settings import (
    HybridExperts,
    check_activation,
    read_delta_net,
    read_experts,
)
from workers.model.families.parts import part

_DEFAULTS = Defaults(
    vocab_size=248320,
    hidden_size=2048,
    num_layers=40,
    max_positions=32768,
    rms_norm_eps=1e-6,
    rotary_share=0.25,
)
_TEXT, _WHOLE = "qwen3_5_moe_text", "qwen3_5_moe"


def family(config: Mapping[str, Any]) -> Qwen35MoeFamily:
    """Return the model that ``config`` describes. Raises ``CheckpointError`` if unsupported."""
    is_whole = config.get("model_type") == _WHOLE
    settings = ConfigReader(_text_config(config) if is_whole else config)
    names = ("Qwen3_5MoeForConditionalGeneration",) if is_whole else ("Qwen3_5MoeForCausalLM",)
    settings.architecture(*names)
    num_layers = settings.integer("num_hidden_layers", default=_DEFAULTS.num_layers)
    experts = read_experts(
        settings,
        sparse_layers=tuple(range(num_layers)),
        num_experts=256,
        top_k=8,
        dense_width=0,
        norm_topk_prob=True,
    )
    spec = read_delta_net(settings, num_layers)
    has_bias = settings.flag("attention_bias", False)
    heads = AttentionHeads.read(
        settings,
        default_hidden=_DEFAULTS.hidden_size,
        default_heads=16,
        default_kv_heads=2,
        default_head_dim=256,
    )
    model_type = _WHOLE if is_whole else _TEXT
    shared = model_config(settings, model_type=model_type, heads=heads, defaults=_DEFAULTS)
    check_activation(shared)
    prefix = "model.language_model" if is_whole else "model"
    return Qwen35MoeFamily(replace(shared, delta_net=spec), experts, has_bias, prefix)


def _text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``text_config`` plus outer keys that it lacks, with outer ``tie_word_embeddings``."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        raise CheckpointError(f"config.json: text_config {text!r} must be an object")
    is_tied = config.get("tie_word_embeddings") or False
    if text.get("tie_word_embeddings") and not is_tied:
        raise CheckpointError(
            "config.json: tie_word_embeddings of text_config is true, and that beside it is not"
        )
    outer = {key: value for key, value in config.items() if key != "text_config"}
    own = {key: value for key, value in text.items() if value is not None}
    return outer | own | {"tie_word_embeddings": is_tied}


class Qwen35MoeFamily(HybridFamily):
    def __init__(
        self, config: ModelConfig, experts: HybridExperts, has_bias: bool, prefix: str
    ) -> None:
        super().__init__(config, experts, has_bias)
        self.prefix = prefix

    def delta_parts(self, prefix: str, spec: DeltaNetSpec) -> dict[str, TensorPart]:
        values, width = spec.num_value_heads * spec.value_dim, self.config.hidden_size
        rows = {
            "qkv": spec.conv_width,
            "z": values,
            "b": spec.num_value_heads,
            "a": spec.num_value_heads,
        }
        return {
            name: part(f"{prefix}.in_proj_{name}.weight", count, width)
            for name, count in rows.items()
        }
