"""Of dots.llm1."""

from __future__ import annotations

from typing import Any

from tests.reference.variants.tokens import EOS, PAD, VOCAB

_DOTS: dict[str, Any] = {
    "model_type": "dots1",
    "architectures": ["Dots1ForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 128,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_theta": 10000000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": EOS,
}
_SMALL_DOTS: dict[str, Any] = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 24,
}

VARIANTS: dict[str, dict[str, Any]] = {
    # group-limited routing with a selection bias
    "dots1-groups": {
        "seed": 211,
        "bf16": True,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": _DOTS | {"n_group": 8, "topk_group": 4},
    },
    # official shape: no n_group/topk_group keys, extra ignored keys, transformers-4 spelling
    "dots1-official-like": {
        "seed": 512,
        "legacy_config": True,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": {k: v for k, v in _DOTS.items() if k not in ("pad_token_id",)}
        | {
            "moe_layer_freq": 1,
            "pretraining_tp": 1,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "use_sliding_window": False,
            "torch_dtype": "float32",
            "transformers_version": "4.46.3",
            "initializer_range": 0.02,
            "use_cache": True,
            "attention_dropout": 0.0,
        },
    },
    # sliding-window layers after the first, grouped-query attention, attention biases,
    # gates not renormalised
    "dots1-swa": {
        "seed": 413,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": _DOTS
        | {
            "sliding_window": 8,
            "max_window_layers": 1,
            "num_key_value_heads": 2,
            "n_routed_experts": 16,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "attention_bias": True,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
            "rope_theta": 10000.0,
        },
    },
    # every selection score negative: experts of unselected groups must still lose
    # (transformers 5 masks them with -inf; transformers 4 masked with 0.0)
    "dots1-negative-bias": {
        "seed": 214,
        "correction_bias": ("normal", -2.0, 0.15),
        "v5_only": True,
        "config": _DOTS
        | {
            "n_group": 4,
            "topk_group": 2,
            "n_routed_experts": 32,
            "num_hidden_layers": 2,
            "moe_intermediate_size": 32,
        },
    },
    # no dense layer; head_dim given and not hidden_size / heads; one shared expert
    "dots1-dense0-headdim": {
        "seed": 15,
        "correction_bias": ("normal", 0.0, 0.3),
        "config": _DOTS
        | _SMALL_DOTS
        | {
            "first_k_dense_replace": 0,
            "head_dim": 24,
            "num_key_value_heads": 2,
            "n_shared_experts": 1,
            "rms_norm_eps": 1e-6,
        },
    },
    # two dense layers of three, yarn rope, tied embeddings
    "dots1-dense2-yarn": {
        "seed": 116,
        "legacy_config": True,
        "correction_bias": ("normal", 0.0, 0.15),
        "embed_std": 0.5,
        "config": _DOTS
        | _SMALL_DOTS
        | {
            "first_k_dense_replace": 2,
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
            "rope_theta": 10000.0,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    },
    # layer_types given explicitly: it overrides max_window_layers
    "dots1-layer-types": {
        "seed": 117,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": _DOTS
        | _SMALL_DOTS
        | {
            "num_hidden_layers": 4,
            "sliding_window": 16,
            "max_window_layers": 0,
            "layer_types": [
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "full_attention",
            ],
        },
    },
    # fused expert tensors, bfloat16 on disk (the correction bias stays float32)
    "dots1-fused-bf16": {
        "seed": 118,
        "fused": True,
        "store": "bfloat16",
        "bf16": True,
        "legacy_config": True,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": {k: v for k, v in _DOTS.items() if k not in ("rope_theta", "rope_scaling")}
        | _SMALL_DOTS
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}, "dtype": "bfloat16"},
    },
    # the activations and rope types that the variants above leave out, in either layout
    "dots1-gelu-tanh-llama3": {
        "seed": 119,
        "shards": 3,
        "legacy_config": True,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": {k: v for k, v in _DOTS.items() if k not in ("rope_theta", "rope_scaling")}
        | _SMALL_DOTS
        | {
            "hidden_act": "gelu_pytorch_tanh",
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    },
    "dots1-relu-dynamic-fp16": {
        "seed": 120,
        "alone": True,
        "store": "float16",
        "legacy_config": True,
        "correction_bias": ("normal", 0.0, 0.15),
        "config": _DOTS
        | _SMALL_DOTS
        | {
            "hidden_act": "relu",
            "sliding_window": 32,
            "max_window_layers": 1,
            "max_position_embeddings": 48,
            "rope_theta": 10000.0,
            "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
            "torch_dtype": "float16",
        },
    },
}
