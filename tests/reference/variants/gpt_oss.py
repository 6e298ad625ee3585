"""Of gpt-oss."""

from __future__ import annotations

from typing import Any

from tests.reference.variants.tokens import EOS, PAD, VOCAB

_GPT_OSS: dict[str, Any] = {
    "model_type": "gpt_oss",
    "architectures": ["GptOssForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "sliding_window": 12,
    "swiglu_limit": 2.0,
    "attention_bias": True,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 64,
    },
    "pad_token_id": PAD,
    "eos_token_id": [EOS, 3],
    "output_router_logits": False,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "gptoss-base": {"seed": 1101, "bf16": True, "max_shard_size": "300KB", "config": _GPT_OSS},
    # as the public config.json is written, experts in MXFP4
    "gptoss-official-like": {
        "seed": 1112,
        "legacy_config": True,
        "store": "bfloat16",
        "bf16": True,
        "mxfp4": True,
        "config": _GPT_OSS
        | {
            "hidden_size": 64,
            "intermediate_size": 64,
            "swiglu_limit": 7.0,
            "experts_per_token": 4,
            "initial_context_length": 64,
            "hidden_act": "silu",
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "transformers_version": "4.55.0.dev0",
            "initializer_range": 0.02,
            "use_cache": True,
            "attention_dropout": 0.0,
            "router_aux_loss_coef": 0.9,
            "quantization_config": {
                "quant_method": "mxfp4",
                "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
            },
        },
    },
    # layers of both kinds in another order, another slope, one key head, no biases of projections
    "gptoss-layers-tied": {
        "seed": 1103,
        "embed_std": 0.5,
        "legacy_config": True,
        "shards": 2,
        "config": _GPT_OSS
        | {
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 1,
            "head_dim": 20,
            "attention_bias": False,
            "tie_word_embeddings": True,
            "num_experts_per_tok": 1,
            "swiglu_alpha": 1.3,
            "swiglu_limit": 0.7,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    },
    # no scaling given: the class has its own
    "gptoss-default-rope": {
        "seed": 1104,
        "legacy_config": True,
        "config": {
            k: v
            for k, v in _GPT_OSS.items()
            if k not in ("rope_scaling", "rope_theta", "sliding_window", "swiglu_limit")
        }
        | {"num_hidden_layers": 2, "max_position_embeddings": 131072},
    },
}
