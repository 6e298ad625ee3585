"""Of GLM-4.5."""

from __future__ import annotations

from typing import Any

from tests.reference.variants.tokens import EOS, PAD, VOCAB

_GLM: dict[str, Any] = {
    "model_type": "glm4_moe",
    "architectures": ["Glm4MoeForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "partial_rotary_factor": 0.5,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "use_qk_norm": False,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "num_nextn_predict_layers": 1,
    "pad_token_id": PAD,
    "eos_token_id": [EOS, 3],
}

VARIANTS: dict[str, dict[str, Any]] = {
    # half of each head rotated, biases without one on o, no norms of heads
    "glm4moe-base": {
        "seed": 701,
        "bf16": True,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": _GLM,
    },
    # as the public config.json of GLM-4.5-Air is written, with the layer that predicts ahead
    "glm4moe-official-like": {
        "seed": 702,
        "legacy_config": True,
        "ahead": True,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": _GLM
        | {
            "torch_dtype": "float32",
            "transformers_version": "4.54.0",
            "initializer_range": 0.02,
            "use_cache": True,
            "attention_dropout": 0.0,
        },
    },
    # norms of heads as in GLM-4.5 and 4.6, groups, more dense layers and shared experts
    "glm4moe-norms-groups": {
        "seed": 703,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": _GLM
        | {
            "use_qk_norm": True,
            "num_hidden_layers": 4,
            "first_k_dense_replace": 3,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "n_shared_experts": 2,
        },
    },
    # no dense layer, no biases, tied embeddings, weights not scaled, a quarter of 24 rotated
    "glm4moe-quarter-tied": {
        "seed": 724,
        "embed_std": 0.5,
        "legacy_config": True,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": {
            k: v
            for k, v in _GLM.items()
            if k not in ("rope_theta", "rope_scaling", "partial_rotary_factor")
        }
        | {
            "head_dim": 24,
            "first_k_dense_replace": 0,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "norm_topk_prob": False,
            "num_hidden_layers": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 20000.0,
                "partial_rotary_factor": 0.25,
            },
        },
    },
    "glm4moe-yarn-fused-bf16": {
        "seed": 705,
        "fused": True,
        "store": "bfloat16",
        "bf16": True,
        "legacy_config": True,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": _GLM
        | {
            "num_hidden_layers": 2,
            "use_qk_norm": True,
            "torch_dtype": "bfloat16",
            "rope_theta": 10000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    },
    "glm4moe-dynamic-fp16": {
        "seed": 706,
        "alone": True,
        "store": "float16",
        "legacy_config": True,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": _GLM
        | {
            "num_hidden_layers": 2,
            "hidden_act": "gelu",
            "max_position_embeddings": 48,
            "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
            "torch_dtype": "float16",
        },
    },
}
