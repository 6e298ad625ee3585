"""Of JetMoE."""

from __future__ import annotations

from typing import Any

from tests.reference.variants.tokens import BOS, EOS, PAD, VOCAB

_JET: dict[str, Any] = {
    "model_type": "jetmoe",
    "architectures": ["JetMoeForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "kv_channels": 16,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "activation_function": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "pad_token_id": EOS,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "aux_loss_coef": 0.01,
    "output_router_logits": False,
}

VARIANTS: dict[str, dict[str, Any]] = {
    # tied embeddings, 2 kv heads x top-2 = 4 query heads
    "jetmoe-tied": {"seed": 21, "config": _JET, "bf16": True},
    # untied, top-3 of 6, kv_channels * num_key_value_heads != hidden_size, and a final-norm
    # epsilon so large that using it in the block norms as well would show
    "jetmoe-untied-top3-eps": {
        "seed": 22,
        "config": _JET
        | {
            "tie_word_embeddings": False,
            "num_experts_per_tok": 3,
            "num_local_experts": 6,
            "num_key_value_heads": 4,
            "kv_channels": 24,
            "rms_norm_eps": 0.05,
            "rope_theta": 5000.0,
            "hidden_size": 80,
        },
    },
    # historical spelling: architecture name with a capital E, tie_word_embeddings absent
    "jetmoe-legacy-config": {
        "seed": 23,
        "legacy_config": True,
        "config": {
            k: v for k, v in _JET.items() if k not in ("tie_word_embeddings", "pad_token_id")
        }
        | {
            "architectures": ["JetMoEForCausalLM"],
            "num_hidden_layers": 2,
            "rms_norm_eps": 1e-5,
            "torch_dtype": "float32",
            "transformers_version": "4.39.3",
            "use_cache": True,
        },
    },
    # one expert per token: the gates are all 1; linear rope
    "jetmoe-top1-linear": {
        "seed": 25,
        "config": _JET
        | {
            "num_experts_per_tok": 1,
            "num_key_value_heads": 4,
            "num_hidden_layers": 2,
            "tie_word_embeddings": False,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    },
    "jetmoe-bf16": {
        "seed": 126,
        "store": "bfloat16",
        "bf16": True,
        "legacy_config": True,
        "config": _JET
        | {
            "num_hidden_layers": 2,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.39.3",
            "output_router_logits": True,
        },
    },
    "jetmoe-gelu-yarn-fp16": {
        "seed": 28,
        "shards": 2,
        "store": "float16",
        "legacy_config": True,
        "config": _JET
        | {
            "num_hidden_layers": 2,
            "activation_function": "gelu",
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
            "torch_dtype": "float16",
        },
    },
    "jetmoe-relu-dynamic": {
        "seed": 29,
        "alone": True,
        "config": _JET
        | {
            "num_hidden_layers": 2,
            "activation_function": "relu",
            "max_position_embeddings": 48,
            "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        },
    },
    # no pad token: the classification head reads the last position, batches are refused
    "jetmoe-seqcls-nopad": {
        "seed": 27,
        "seqcls": True,
        "legacy_config": True,
        "config": {k: v for k, v in _JET.items() if k != "pad_token_id"}
        | {
            "architectures": ["JetMoeForSequenceClassification"],
            "num_hidden_layers": 2,
            "id2label": {"0": "score"},
            "label2id": {"score": 0},
            "problem_type": "regression",
        },
    },
    "jetmoe-seqcls": {
        "seed": 24,
        "seqcls": True,
        "config": _JET
        | {
            "architectures": ["JetMoeForSequenceClassification"],
            "pad_token_id": PAD,
            "id2label": {"0": "negative", "1": "neutral", "2": "positive"},
            "label2id": {"negative": 0, "neutral": 1, "positive": 2},
        },
    },
}
