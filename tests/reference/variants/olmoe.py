"""Of OLMoE."""

from __future__ import annotations

from typing import Any

from tests.reference.variants.tokens import EOS, PAD, VOCAB

_OLMOE: dict[str, Any] = {
    "model_type": "olmoe",
    "architectures": ["OlmoeForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": False,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "clip_qkv": None,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "router_aux_loss_coef": 0.01,
    "output_router_logits": False,
}
_SMALL: dict[str, Any] = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
}

VARIANTS: dict[str, dict[str, Any]] = {
    # 64 experts, top-8, gates not renormalised; written in several shards + index
    "olmoe-base": {"seed": 301, "config": _OLMOE, "max_shard_size": "1MB", "bf16": True},
    # renormalised gates, grouped-query attention, clipping that really clips
    "olmoe-norm-gqa-clip": {
        "seed": 2,
        "config": _OLMOE
        | {
            "norm_topk_prob": True,
            "num_key_value_heads": 2,
            "clip_qkv": 0.7,
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "intermediate_size": 48,
            "rope_theta": 500.0,
        },
    },
    # attention biases, tied embeddings, single kv head
    "olmoe-bias-tied-mqa": {
        "seed": 3,
        "embed_std": 0.5,
        "config": _OLMOE
        | {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "num_key_value_heads": 1,
            "num_experts": 16,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 2,
        },
    },
    # as the official config.json is written: transformers-4 keys
    "olmoe-legacy-config": {
        "seed": 104,
        "legacy_config": True,
        "config": {k: v for k, v in _OLMOE.items() if k not in ("pad_token_id", "rms_norm_eps")}
        | {
            "num_experts": 32,
            "num_hidden_layers": 2,
            "initializer_range": 0.02,
            "torch_dtype": "float32",
            "transformers_version": "4.43.0.dev0",
            "use_cache": True,
            "attention_dropout": 0.0,
        },
    },
    # as olmoe-legacy-config but two files and an index, bfloat16 on disk like the public checkpoint
    "olmoe-bf16": {
        "seed": 5,
        "legacy_config": True,
        "store": "bfloat16",
        "bf16": True,
        "shards": 2,
        "config": {k: v for k, v in _OLMOE.items() if k not in ("rms_norm_eps",)}
        | {
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 2,
            "intermediate_size": 48,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.43.0.dev0",
            "output_router_logits": True,
        },
    },
    # fused expert tensors on disk
    "olmoe-fused": {
        "seed": 406,
        "fused": True,
        "legacy_config": True,
        "config": {k: v for k, v in _OLMOE.items() if k not in ("rope_theta", "rope_scaling")}
        | {
            "num_experts": 16,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
            "dtype": "float32",
        },
    },
    # rope variants; the first two in the transformers-4 spelling
    "olmoe-rope-linear": {
        "seed": 7,
        "legacy_config": True,
        "config": _OLMOE | _SMALL | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    },
    "olmoe-rope-dynamic": {
        "seed": 8,
        "legacy_config": True,
        "alone": True,
        "config": _OLMOE
        | _SMALL
        | {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 48},
    },
    "olmoe-rope-yarn": {
        "seed": 9,
        "config": _OLMOE
        | _SMALL
        | {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 4.0,
                "beta_slow": 1.0,
            }
        },
    },
    "olmoe-rope-llama3": {
        "seed": 10,
        "config": _OLMOE
        | _SMALL
        | {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    },
    # float16 on disk, another activation
    "olmoe-gelu-fp16": {
        "seed": 31,
        "store": "float16",
        "legacy_config": True,
        "config": _OLMOE | _SMALL | {"hidden_act": "gelu", "torch_dtype": "float16"},
    },
}
