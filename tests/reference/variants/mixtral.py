"""Of Mixtral and MiniMax-M2."""

from __future__ import annotations

from typing import Any

from tests.reference.variants.tokens import BOS, EOS, PAD, VOCAB

_MIXTRAL: dict[str, Any] = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "rope_theta": 1000000.0,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.02,
}
_MINIMAX: dict[str, Any] = {
    "model_type": "minimax_m2",
    "architectures": ["MiniMaxM2ForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "num_local_experts": 32,
    "num_experts_per_tok": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 5000000.0,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "output_router_logits": False,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "mixtral-base": {"seed": 801, "bf16": True, "max_shard_size": "300KB", "config": _MIXTRAL},
    # as the public config.json of 8x7B is written, bfloat16 on disk
    "mixtral-official-like": {
        "seed": 802,
        "legacy_config": True,
        "store": "bfloat16",
        "bf16": True,
        "config": {k: v for k, v in _MIXTRAL.items() if k != "pad_token_id"}
        | {
            "torch_dtype": "bfloat16",
            "transformers_version": "4.36.0.dev0",
            "initializer_range": 0.02,
            "use_cache": True,
            "attention_dropout": 0.0,
        },
    },
    # a window in every layer, tied embeddings, top-3 of 6, head_dim given, no rope_theta
    "mixtral-window-tied": {
        "seed": 803,
        "embed_std": 0.5,
        "legacy_config": True,
        "config": {k: v for k, v in _MIXTRAL.items() if k != "rope_theta"}
        | {
            "sliding_window": 12,
            "tie_word_embeddings": True,
            "num_experts_per_tok": 3,
            "num_local_experts": 6,
            "head_dim": 24,
            "num_key_value_heads": 1,
            "num_hidden_layers": 2,
        },
    },
    "mixtral-llama3-gelu-fp16": {
        "seed": 804,
        "legacy_config": True,
        "store": "float16",
        "shards": 2,
        "config": _MIXTRAL
        | {
            "hidden_act": "gelu",
            "num_experts_per_tok": 1,
            "num_hidden_layers": 2,
            "torch_dtype": "float16",
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    },
    # as the public config.json is written, with keys that other programs read
    "minimaxm2-official-like": {
        "seed": 901,
        "legacy_config": True,
        "bf16": True,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": _MINIMAX
        | {
            "attn_type_list": [1, 1, 1],
            "use_qk_norm": True,
            "qk_norm_type": "per_layer",
            "use_routing_bias": True,
            "scoring_func": "sigmoid",
            "shared_intermediate_size": 0,
            "use_mtp": True,
            "num_mtp_modules": 3,
            "mtp_transformer_layers": 1,
            "torch_dtype": "float32",
            "transformers_version": "4.46.1",
        },
    },
    # whole heads rotated, tied embeddings, one key head, float8 in blocks
    "minimaxm2-fp8-whole": {
        "seed": 1902,
        "legacy_config": True,
        "scaled_block": (8, 16),
        "store": "bfloat16",
        "embed_std": 0.5,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": {k: v for k, v in _MINIMAX.items() if k != "rotary_dim"}
        | {
            "intermediate_size": 32,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": 2,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "quantization_config": {
                "quant_method": "fp8",
                "fmt": "float8_e4m3fn",
                "activation_scheme": "dynamic",
                "weight_block_size": [8, 16],
                "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
            },
        },
    },
    "minimaxm2-dynamic": {
        "seed": 3903,
        "alone": True,
        "legacy_config": True,
        "correction_bias": ("normal", -1.5, 0.15),
        "config": _MINIMAX
        | {
            "num_hidden_layers": 2,
            "hidden_act": "relu",
            "max_position_embeddings": 48,
            "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        },
    },
}
