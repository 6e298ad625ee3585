"""Of FlexOlmo."""

from __future__ import annotations

from typing import Any

from tests.reference.variants.tokens import EOS, PAD, VOCAB

_FLEX_OLMO: dict[str, Any] = {
    "model_type": "flex_olmo",
    "architectures": ["FlexOlmoForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 7,
    "num_experts_per_tok": 5,
    "norm_topk_prob": False,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.01,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "flexolmo-base": {"seed": 1201, "bf16": True, "max_shard_size": "300KB", "config": _FLEX_OLMO},
    # as the public config.json is written, bfloat16 on disk
    "flexolmo-official-like": {
        "seed": 1242,
        "legacy_config": True,
        "store": "bfloat16",
        "bf16": True,
        "config": _FLEX_OLMO
        | {
            "torch_dtype": "bfloat16",
            "transformers_version": "4.53.0.dev0",
            "initializer_range": 0.02,
            "use_cache": True,
            "attention_dropout": 0.0,
            "rope_scaling": None,
            "bos_token_id": None,
        },
    },
    # biases, two key heads, renormalised gates, tied embeddings, fused experts, yarn
    "flexolmo-bias-gqa-tied": {
        "seed": 1203,
        "embed_std": 0.5,
        "legacy_config": True,
        "fused": True,
        "config": _FLEX_OLMO
        | {
            "attention_bias": True,
            "num_key_value_heads": 2,
            "norm_topk_prob": True,
            "num_experts": 12,
            "num_experts_per_tok": 3,
            "hidden_act": "gelu",
            "rms_norm_eps": 1e-3,
            "tie_word_embeddings": True,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    },
}
