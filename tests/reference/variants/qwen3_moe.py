"""Of Qwen3-MoE."""

from __future__ import annotations

from typing import Any

from tests.reference.variants.tokens import BOS, EOS, PAD, VOCAB

_QWEN3: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}

VARIANTS: dict[str, dict[str, Any]] = {
    # weights scaled to sum 1, heads that are wider than hidden_size / heads; in several shards
    "qwen3moe-base": {"seed": 601, "bf16": True, "max_shard_size": "300KB", "config": _QWEN3},
    # as the public config.json is written: transformers-4 keys
    "qwen3moe-official-like": {
        "seed": 602,
        "legacy_config": True,
        "config": {k: v for k, v in _QWEN3.items() if k != "pad_token_id"}
        | {
            "max_window_layers": 48,
            "torch_dtype": "float32",
            "transformers_version": "4.51.0",
            "initializer_range": 0.02,
            "use_cache": True,
            "attention_dropout": 0.0,
        },
    },
    # dense layers by both keys: of six, 1, 3 and 5 are sparse, and 3 is not
    "qwen3moe-dense-layers": {
        "seed": 603,
        "config": _QWEN3
        | {
            "num_hidden_layers": 6,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
        },
    },
    # a window in every layer, biases, tied embeddings, one key head, no head_dim
    "qwen3moe-window-bias-tied": {
        "seed": 604,
        "embed_std": 0.5,
        "config": {k: v for k, v in _QWEN3.items() if k != "head_dim"}
        | {
            "use_sliding_window": True,
            "sliding_window": 12,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "num_key_value_heads": 1,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 2,
        },
    },
    "qwen3moe-fused-bf16": {
        "seed": 605,
        "fused": True,
        "store": "bfloat16",
        "bf16": True,
        "legacy_config": True,
        "config": _QWEN3
        | {
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 2,
            "torch_dtype": "bfloat16",
        },
    },
    # float8 with a scale for each block of 8 x 16; public checkpoints have one of 128 x 128
    "qwen3moe-fp8": {
        "seed": 607,
        "scaled_block": (8, 16),
        "store": "bfloat16",
        "legacy_config": True,
        "config": _QWEN3
        | {
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 32,
            "head_dim": 16,
            "torch_dtype": "bfloat16",
            "quantization_config": {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": [8, 16],
                "modules_to_not_convert": ["lm_head"],
            },
        },
    },
    # as the model cards say for long contexts
    "qwen3moe-yarn-gelu": {
        "seed": 606,
        "shards": 2,
        "legacy_config": True,
        "config": _QWEN3
        | {
            "num_experts": 16,
            "num_experts_per_tok": 1,
            "num_hidden_layers": 2,
            "hidden_act": "gelu",
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    },
}
