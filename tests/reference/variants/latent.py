"""Of the families with latent attention."""

from __future__ import annotations

from typing import Any

from tests.reference.variants.tokens import BOS, EOS, PAD, VOCAB

_DEEPSEEK: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_DEEPSEEK2: dict[str, Any] = {
    **_DEEPSEEK,
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
    "n_shared_experts": 2,
}
_FLASH: dict[str, Any] = {
    **{k: v for k, v in _DEEPSEEK.items() if k != "first_k_dense_replace"},
    "model_type": "glm4_moe_lite",
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "qk_nope_head_dim": 24,
    "v_head_dim": 32,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "eos_token_id": [EOS, 3],
}

VARIANTS: dict[str, dict[str, Any]] = {
    # queries by a vector of their own, groups of experts, neighbours rotated
    "deepseekv3-base": {
        "seed": 1201,
        "bf16": True,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": _DEEPSEEK,
    },
    # as the public config.json is written: float8 in blocks, YaRN with mscale, a layer that
    # predicts ahead
    "deepseekv3-official-like": {
        "seed": 1242,
        "legacy_config": True,
        "ahead": True,
        "scaled_block": (8, 8),
        "store": "bfloat16",
        "bf16": True,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": _DEEPSEEK
        | {
            "torch_dtype": "bfloat16",
            "transformers_version": "4.33.1",
            "ep_size": 1,
            "moe_layer_freq": 1,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "num_nextn_predict_layers": 1,
            "initializer_range": 0.02,
            "use_cache": True,
            "attention_dropout": 0.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 64,
            },
            "quantization_config": {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [8, 8],
            },
        },
    },
    # queries of the hidden state itself, halves rotated, biases, no group, no dense layer, tied
    "deepseekv3-plain-tied": {
        "seed": 1203,
        "fused": True,
        "embed_std": 0.5,
        "legacy_config": True,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": {k: v for k, v in _DEEPSEEK.items() if k not in ("rope_theta", "rope_scaling")}
        | {
            "q_lora_rank": None,
            "attention_bias": True,
            "rope_interleave": False,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-3,
            "num_hidden_layers": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 20000.0,
                "factor": 8.0,
                "mscale": 0.8,
                "mscale_all_dim": 0.6,
                "original_max_position_embeddings": 64,
            },
        },
    },
    "deepseekv3-dynamic-fp16": {
        "seed": 1204,
        "alone": True,
        "store": "float16",
        "legacy_config": True,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": _DEEPSEEK
        | {
            "num_hidden_layers": 2,
            "n_shared_experts": 2,
            "attention_bias": True,
            "hidden_act": "gelu",
            "max_position_embeddings": 48,
            "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
            "torch_dtype": "float16",
        },
    },
    # as Kimi K2's public config.json is written: one group, one dense layer
    "kimik2-official-like": {
        "seed": 1225,
        "legacy_config": True,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": _DEEPSEEK
        | {
            "model_type": "kimi_k2",
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.827,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "num_nextn_predict_layers": 0,
            "torch_dtype": "float32",
            "rope_theta": 50000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 32.0,
                "beta_fast": 1.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 64,
            },
        },
    },
    # softmax in groups, as the public config.json of DeepSeek-V2 is written
    "deepseekv2-official-like": {
        "seed": 1301,
        "legacy_config": True,
        "bf16": True,
        "config": _DEEPSEEK2
        | {
            "torch_dtype": "float32",
            "moe_layer_freq": 1,
            "scoring_func": "softmax",
            "routed_scaling_factor": 4.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 0.707,
                "mscale_all_dim": 0.707,
                "original_max_position_embeddings": 64,
            },
        },
    },
    # as DeepSeek-V2-Lite: queries of the hidden state itself, no groups
    "deepseekv2-lite": {
        "seed": 1302,
        "max_shard_size": "300KB",
        "config": _DEEPSEEK2
        | {
            "q_lora_rank": None,
            "topk_method": "greedy",
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
        },
    },
    "deepseekv2-bias-tied-bf16": {
        "seed": 1303,
        "fused": True,
        "store": "bfloat16",
        "bf16": True,
        "embed_std": 0.5,
        "legacy_config": True,
        "config": _DEEPSEEK2
        | {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "first_k_dense_replace": 0,
            "num_hidden_layers": 2,
            "topk_group": 1,
            "hidden_act": "gelu_pytorch_tanh",
            "torch_dtype": "bfloat16",
        },
    },
    # as the public config.json of GLM-4.7-Flash is written, with the layer that predicts ahead
    "glm4lite-official-like": {
        "seed": 1431,
        "legacy_config": True,
        "ahead": True,
        "bf16": True,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": _FLASH
        | {
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 1,
            "partial_rotary_factor": 1.0,
            "topk_method": "noaux_tc",
            "torch_dtype": "float32",
        },
    },
    # dense layers anywhere, groups, biases, halves rotated, tied
    "glm4lite-layers-tied": {
        "seed": 1412,
        "embed_std": 0.5,
        "legacy_config": True,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": _FLASH
        | {
            "num_hidden_layers": 4,
            "mlp_layer_types": ["sparse", "dense", "sparse", "dense"],
            "n_group": 4,
            "topk_group": 2,
            "attention_bias": True,
            "rope_interleave": False,
            "tie_word_embeddings": True,
            "norm_topk_prob": False,
        },
    },
}
