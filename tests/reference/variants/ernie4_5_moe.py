"""Of ERNIE 4.5."""

from __future__ import annotations

from typing import Any

from tests.reference.variants.tokens import BOS, EOS, PAD, VOCAB

_ERNIE: dict[str, Any] = {
    "model_type": "ernie4_5_moe",
    "architectures": ["Ernie4_5_MoeForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_num_experts": 32,
    "moe_num_shared_experts": 2,
    "moe_k": 6,
    "moe_layer_start_index": 1,
    "moe_layer_end_index": -1,
    "moe_layer_interval": 1,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
    "use_bias": False,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "output_router_logits": False,
}

VARIANTS: dict[str, dict[str, Any]] = {
    # as the public config.json of 21B-A3B is written, bfloat16 on disk but for the router
    "ernie45-official-like": {
        "seed": 5951,
        "legacy_config": True,
        "store": "bfloat16",
        "bf16": True,
        "embed_std": 0.5,
        "correction_bias": ("normal", 0.0, 0.02),
        "config": _ERNIE
        | {
            "moe_capacity": [64, 64, 64],
            "moe_gate": "topk",
            "moe_use_aux_free": True,
            "num_nextn_predict_layers": 1,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        },
    },
    # of six layers 1, 3 and 5 are at the interval, and 5 is behind the end; no shared experts
    "ernie45-layers": {
        "seed": 1952,
        "legacy_config": True,
        "correction_bias": ("normal", 0.0, 0.05),
        "config": _ERNIE
        | {
            "num_hidden_layers": 6,
            "moe_layer_interval": 2,
            "moe_layer_end_index": 4,
            "moe_num_shared_experts": 0,
            "moe_num_experts": 8,
            "moe_k": 2,
            "moe_norm_min": 0.6,
            "tie_word_embeddings": False,
        },
    },
    # another head_dim, one key head, no dense layer
    "ernie45-headdim-linear": {
        "seed": 953,
        "legacy_config": True,
        "embed_std": 0.5,
        "correction_bias": ("normal", 0.0, 0.05),
        "config": _ERNIE
        | {
            "head_dim": 24,
            "num_key_value_heads": 1,
            "num_hidden_layers": 2,
            "moe_layer_start_index": 0,
            "moe_num_experts": 8,
            "moe_k": 8,
            "hidden_act": "gelu",
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    },
}
