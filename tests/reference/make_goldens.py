#!/usr/bin/env python3
"""Tiny random checkpoints of all families, with golden outputs.

    python reference/make_goldens.py OUT_DIR                     # write every variant
    python reference/make_goldens.py OUT_DIR --only olmoe dots1  # name prefixes
    python reference/make_goldens.py OUT_DIR --verify            # re-check an existing directory
    python reference/make_goldens.py OUT_DIR --list

The expected outputs come from Hugging Face transformers (tested with 5.23.0) run on
CPU, one prompt at a time, in float32 (some variants also in bfloat16).  Everything is a function
of the constants in this file: weights are drawn tensor by tensor from numpy's frozen MT19937
stream, seeded by (variant seed, tensor name), so they do not depend on the torch or
transformers version.  The tensors of a golden are described in ``reference/goldens.py``.
"""

# mypy: ignore-errors

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import zlib
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import itertools

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

transformers.utils.logging.disable_progress_bar()
V4 = int(transformers.__version__.split(".")[0]) < 5

NEW_TOKENS = 32
PROMPT_LENS = (1, 2, 7, 8, 16, 17, 40, 100)
VOCAB = 512
PAD, BOS, EOS = 0, 1, 2  # the tiny tokenizer's special ids
FIRST_PLAIN_ID = 6  # prompts are drawn from [FIRST_PLAIN_ID, VOCAB)

# --------------------------------------------------------------------------------------
# Variants.  "config" holds exactly what is written to config.json besides the
# boilerplate; "legacy_config" variants keep the transformers-4 spelling of config.json
# (rope_theta, rope_scaling, torch_dtype, extra ignored keys), the others are rewritten by
# save_pretrained of the installed transformers (rope_parameters, dtype).
#   fused        experts on disk as one 3-D tensor per layer, the in-memory names of version 5
#   store        dtype of the tensors on disk (default float32)
#   bf16         also record a bfloat16 run
#   alone        outputs depend on what else is in the batch (dynamic rope): no batched checks
# --------------------------------------------------------------------------------------

_OLMOE = {
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

_DOTS = {
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

_QWEN3 = {
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

_GLM = {
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

_DEEPSEEK = {
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
_DEEPSEEK2 = {
    **_DEEPSEEK,
    "model_type": "deepseek_v2",
    "architectures": ["DeepseekV2ForCausalLM"],
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
    "n_shared_experts": 2,
}
_FLASH = {
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

_MIXTRAL = {
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

_FLEX_OLMO = {
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

_GPT_OSS = {
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

_MINIMAX = {
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

_ERNIE = {
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

# The norm of what a state gives has almost nothing to divide by in places: a larger epsilon than
# that of the public checkpoints keeps differences from growing there.
_QWEN3_NEXT = {
    "model_type": "qwen3_next",
    "architectures": ["Qwen3NextForCausalLM"],
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 12,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-4,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_theta": 10000000.0,
    "rope_scaling": None,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}

_NOT_IN_QWEN35 = (
    *("intermediate_size", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"),
    *("rope_theta", "rope_scaling", "partial_rotary_factor"),
)
_QWEN35_TEXT = {k: v for k, v in _QWEN3_NEXT.items() if k not in _NOT_IN_QWEN35} | {
    "model_type": "qwen3_5_moe_text",
    "architectures": ["Qwen3_5MoeForCausalLM"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000.0,
        "partial_rotary_factor": 0.5,
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
    },
}

_JET = {
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

_SMALL = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
}
_SMALL_DOTS = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 24,
}

VARIANTS: dict[str, dict] = {
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
    "qwen3next-base": {"seed": 421, "bf16": True, "config": _QWEN3_NEXT},
    # as the official config.json is written, with a tensor of the layer that predicts ahead
    "qwen3next-official-like": {
        "seed": 402,
        "legacy_config": True,
        "shards": 2,
        "store": "bfloat16",
        "bf16": True,
        "extra": "mtp.fc.weight",
        "config": _QWEN3_NEXT
        | {
            "full_attention_interval": 2,
            "num_hidden_layers": 3,
            "linear_num_value_heads": 2,
            "rms_norm_eps": 1e-6,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.57.0.dev0",
            "use_cache": True,
            "use_sliding_window": False,
        },
    },
    # kinds of layers by name, dense ones among them, weights that are not scaled to sum 1, biases
    "qwen3next-layers-bias-tied": {
        "seed": 423,
        "embed_std": 0.5,
        "config": _QWEN3_NEXT
        | {
            "num_hidden_layers": 4,
            "layer_types": [
                *("full_attention", "linear_attention", "linear_attention", "full_attention"),
            ],
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "norm_topk_prob": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 3,
        },
    },
    # a convolution over two positions, fused experts, values wider than keys, half of heads rotated
    "qwen3next-yarn-fused-fp16": {
        "seed": 404,
        "fused": True,
        "store": "float16",
        "config": _QWEN3_NEXT
        | {
            "full_attention_interval": 3,
            "num_hidden_layers": 3,
            "linear_conv_kernel_dim": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 40,
            "partial_rotary_factor": 0.5,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    },
    "qwen3next-fp8": {
        "seed": 405,
        "scaled_block": (8, 16),
        "store": "bfloat16",
        "legacy_config": True,
        "config": _QWEN3_NEXT
        | {
            "full_attention_interval": 2,
            "num_hidden_layers": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "linear_value_head_dim": 24,
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
    "qwen35moe-base": {"seed": 451, "bf16": True, "config": _QWEN35_TEXT},
    # as the official config.json is written: the text model inside of one that sees images
    "qwen35moe-official-like": {
        "seed": 442,
        "legacy_config": True,
        "fused": True,
        "store": "bfloat16",
        "bf16": True,
        "extra": "mtp.fc.weight",
        "config": {
            "model_type": "qwen3_5_moe",
            "architectures": ["Qwen3_5MoeForConditionalGeneration"],
            "image_token_id": 500,
            "video_token_id": 501,
            "vision_start_token_id": 502,
            "vision_end_token_id": 503,
            "tie_word_embeddings": False,
            "transformers_version": "4.57.0.dev0",
            "text_config": {k: v for k, v in _QWEN35_TEXT.items() if k != "architectures"}
            | {
                "attn_output_gate": True,
                "dtype": "bfloat16",
                "full_attention_interval": 4,
                "layer_types": [*["linear_attention"] * 3, "full_attention"],
                "linear_num_key_heads": 4,
                "mamba_ssm_dtype": "float32",
                "mtp_num_hidden_layers": 1,
                "mtp_use_dedicated_embeddings": False,
                "rms_norm_eps": 1e-3,
            },
            "vision_config": {
                "model_type": "qwen3_5_moe",
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "num_position_embeddings": 16,
                "out_hidden_size": 64,
            },
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

CLASSES = {
    "OlmoeForCausalLM": "OlmoeForCausalLM",
    "Dots1ForCausalLM": "Dots1ForCausalLM",
    "Qwen3MoeForCausalLM": "Qwen3MoeForCausalLM",
    "Glm4MoeForCausalLM": "Glm4MoeForCausalLM",
    "DeepseekV2ForCausalLM": "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM": "DeepseekV3ForCausalLM",
    "Glm4MoeLiteForCausalLM": "Glm4MoeLiteForCausalLM",
    "MixtralForCausalLM": "MixtralForCausalLM",
    "GptOssForCausalLM": "GptOssForCausalLM",
    "FlexOlmoForCausalLM": "FlexOlmoForCausalLM",
    "Ernie4_5_MoeForCausalLM": "Ernie4_5_MoeForCausalLM",
    "MiniMaxM2ForCausalLM": "MiniMaxM2ForCausalLM",
    "Qwen3NextForCausalLM": "Qwen3NextForCausalLM",
    "Qwen3_5MoeForCausalLM": "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3_5MoeForConditionalGeneration",
    "JetMoeForCausalLM": "JetMoeForCausalLM",
    "JetMoEForCausalLM": "JetMoeForCausalLM",
    "JetMoeForSequenceClassification": "JetMoeForSequenceClassification",
}


def model_class(cfg: dict):
    return getattr(transformers, CLASSES[cfg["architectures"][0]])


# --------------------------------------------------------------------------------------
# Checkpoint tensors, by their on-disk names
# --------------------------------------------------------------------------------------


HYBRID = ("qwen3_next", "qwen3_5_moe_text", "qwen3_5_moe")


def hybrid_specs(cfg: dict):
    """``tensor_specs`` of families with Gated DeltaNet."""
    is_next, p = cfg["model_type"] == "qwen3_next", "model"
    if "text_config" in cfg:
        cfg, p = (
            cfg["text_config"] | {"tie_word_embeddings": cfg["tie_word_embeddings"]},
            ("model.language_model"),
        )
    H, L, V = cfg["hidden_size"], cfg["num_hidden_layers"], cfg["vocab_size"]
    yield f"{p}.embed_tokens.weight", (V, H), "embed"
    yield f"{p}.norm.weight", (H,), "centred norm"
    if not cfg["tie_word_embeddings"]:
        yield "lm_head.weight", (V, H), "head"
    A, KV, D = cfg["num_attention_heads"], cfg["num_key_value_heads"], cfg["head_dim"]
    G, VH = cfg["linear_num_key_heads"], cfg["linear_num_value_heads"]
    keys, values = G * cfg["linear_key_head_dim"], VH * cfg["linear_value_head_dim"]
    every = cfg.get("full_attention_interval", 4)
    kinds = cfg.get("layer_types") or [
        "linear_attention" if (i + 1) % every else "full_attention" for i in range(L)
    ]

    def mlp(prefix, inter):
        yield f"{prefix}.gate_proj.weight", (inter, H), "linear"
        yield f"{prefix}.up_proj.weight", (inter, H), "linear"
        yield f"{prefix}.down_proj.weight", (H, inter), "linear"

    for i in range(L):
        own = f"{p}.layers.{i}"
        yield f"{own}.input_layernorm.weight", (H,), "centred norm"
        yield f"{own}.post_attention_layernorm.weight", (H,), "centred norm"
        if kinds[i] == "full_attention":
            a = f"{own}.self_attn"
            for name, rows in (("q", 2 * A * D), ("k", KV * D), ("v", KV * D), ("o", H)):
                yield f"{a}.{name}_proj.weight", (rows, A * D if name == "o" else H), "linear"
                if cfg["attention_bias"]:
                    yield f"{a}.{name}_proj.bias", (rows,), "bias"
            yield f"{a}.q_norm.weight", (D,), "centred norm"
            yield f"{a}.k_norm.weight", (D,), "centred norm"
        else:
            a = f"{own}.linear_attn"
            if is_next:
                yield f"{a}.in_proj_qkvz.weight", (2 * keys + 2 * values, H), "linear"
                yield f"{a}.in_proj_ba.weight", (2 * VH, H), "linear"
            else:
                yield f"{a}.in_proj_qkv.weight", (2 * keys + values, H), "linear"
                yield f"{a}.in_proj_z.weight", (values, H), "linear"
                yield f"{a}.in_proj_b.weight", (VH, H), "linear"
                yield f"{a}.in_proj_a.weight", (VH, H), "linear"
            kernel = cfg["linear_conv_kernel_dim"]
            yield f"{a}.conv1d.weight", (2 * keys + values, 1, kernel), "conv"
            yield f"{a}.A_log", (VH,), "rate"
            yield f"{a}.dt_bias", (VH,), "bias"
            yield f"{a}.norm.weight", (cfg["linear_value_head_dim"],), "norm"
            yield f"{a}.out_proj.weight", (H, values), "linear"
        is_sparse = (i + 1) % cfg.get("decoder_sparse_step", 1) == 0
        if i in cfg.get("mlp_only_layers", ()) or not is_sparse:
            yield from mlp(f"{own}.mlp", cfg["intermediate_size"])
            continue
        yield f"{own}.mlp.gate.weight", (cfg["num_experts"], H), "router"
        for e in range(cfg["num_experts"]):
            yield from mlp(f"{own}.mlp.experts.{e}", cfg["moe_intermediate_size"])
        yield from mlp(f"{own}.mlp.shared_expert", cfg["shared_expert_intermediate_size"])
        yield f"{own}.mlp.shared_expert_gate.weight", (1, H), "router"


def tensor_specs(cfg: dict):
    """Yield (name, shape, kind) for one checkpoint, one tensor per expert projection."""
    if cfg["model_type"] in HYBRID:
        yield from hybrid_specs(cfg)
        return
    H, V, L = cfg["hidden_size"], cfg["vocab_size"], cfg["num_hidden_layers"]
    yield "model.embed_tokens.weight", (V, H), "embed"
    yield "model.norm.weight", (H,), "norm"
    seqcls = "SequenceClassification" in cfg["architectures"][0]
    tied = cfg.get("tie_word_embeddings", cfg["model_type"] == "jetmoe")
    if seqcls:
        yield "score.weight", (len(cfg["id2label"]), H), "head"
    elif not tied:
        yield "lm_head.weight", (V, H), "head"

    for i in range(L):
        p = f"model.layers.{i}"
        is_behind = cfg["model_type"] == "flex_olmo"  # norms come after attention and experts
        yield f"{p}.{'post_feedforward' if is_behind else 'input'}_layernorm.weight", (H,), "norm"
        yield f"{p}.post_attention_layernorm.weight", (H,), "norm"
        if cfg["model_type"] == "jetmoe":
            E, KV, D, W = (
                cfg["num_local_experts"],
                cfg["num_key_value_heads"],
                cfg["kv_channels"],
                cfg["intermediate_size"],
            )
            a = f"{p}.self_attention"
            yield f"{a}.kv_proj.weight", (2 * KV * D, H), "linear"
            yield f"{a}.experts.bias", (H,), "bias"
            yield f"{a}.experts.input_linear.weight", (E, KV * D, H), "query"
            yield f"{a}.experts.output_linear.weight", (E, H, KV * D), "linear"
            yield f"{a}.experts.router.layer.weight", (E, H), "router"
            yield f"{p}.mlp.bias", (H,), "bias"
            yield f"{p}.mlp.input_linear.weight", (E, 2 * W, H), "linear"
            yield f"{p}.mlp.output_linear.weight", (E, H, W), "linear"
            yield f"{p}.mlp.router.layer.weight", (E, H), "router"
            continue
        A, KV = cfg["num_attention_heads"], cfg["num_key_value_heads"]
        D = cfg.get("head_dim") or H // A
        a = f"{p}.self_attn"
        if "kv_lora_rank" in cfg:
            yield from latent_specs(cfg, a)
        for name, rows in (("q", A * D), ("k", KV * D), ("v", KV * D), ("o", H)):
            if "kv_lora_rank" in cfg:
                break
            yield f"{a}.{name}_proj.weight", (rows, A * D if name == "o" else H), "linear"
            if cfg.get("attention_bias") and not (name == "o" and cfg["model_type"] == "glm4_moe"):
                yield f"{a}.{name}_proj.bias", (rows,), "bias"
        # Norms are of all heads at once, or per head.
        whole = cfg["model_type"] in ("olmoe", "flex_olmo", "minimax_m2")
        plain = ("mixtral", "ernie4_5_moe", "gpt_oss", *LATENT)
        if cfg.get("use_qk_norm", cfg["model_type"] not in plain):
            yield f"{a}.q_norm.weight", (A * D if whole else D,), "norm"
            yield f"{a}.k_norm.weight", (KV * D if whole else D,), "norm"

        def mlp(prefix, inter):
            yield f"{prefix}.gate_proj.weight", (inter, H), "linear"
            yield f"{prefix}.up_proj.weight", (inter, H), "linear"
            yield f"{prefix}.down_proj.weight", (H, inter), "linear"

        if cfg["model_type"] == "gpt_oss":
            E, W = cfg["num_local_experts"], cfg["intermediate_size"]
            yield f"{a}.sinks", (A,), "sink"
            yield f"{p}.mlp.router.weight", (E, H), "router"
            yield f"{p}.mlp.router.bias", (E,), "bias"
            yield f"{p}.mlp.experts.gate_up_proj", (E, H, 2 * W), "transposed"
            yield f"{p}.mlp.experts.gate_up_proj_bias", (E, 2 * W), "bias"
            yield f"{p}.mlp.experts.down_proj", (E, W, H), "transposed"
            yield f"{p}.mlp.experts.down_proj_bias", (E, H), "bias"
        elif cfg["model_type"] in ("mixtral", "minimax_m2"):
            b, inter = f"{p}.block_sparse_moe", cfg["intermediate_size"]
            yield f"{b}.gate.weight", (cfg["num_local_experts"], H), "router"
            if cfg["model_type"] == "minimax_m2":
                yield f"{b}.e_score_correction_bias", (cfg["num_local_experts"],), "correction"
            for e in range(cfg["num_local_experts"]):
                yield f"{b}.experts.{e}.w1.weight", (inter, H), "linear"
                yield f"{b}.experts.{e}.w2.weight", (H, inter), "linear"
                yield f"{b}.experts.{e}.w3.weight", (inter, H), "linear"
        elif cfg["model_type"] in ("olmoe", "flex_olmo"):
            yield f"{p}.mlp.gate.weight", (cfg["num_experts"], H), "router"
            for e in range(cfg["num_experts"]):
                yield from mlp(f"{p}.mlp.experts.{e}", cfg["intermediate_size"])
        elif cfg["model_type"] == "qwen3_moe":
            experts = cfg.get("num_experts") or cfg["num_local_experts"]
            is_sparse = (i + 1) % cfg["decoder_sparse_step"] == 0
            if i in cfg["mlp_only_layers"] or not is_sparse:
                yield from mlp(f"{p}.mlp", cfg["intermediate_size"])
                continue
            yield f"{p}.mlp.gate.weight", (experts, H), "router"
            for e in range(experts):
                yield from mlp(f"{p}.mlp.experts.{e}", cfg["moe_intermediate_size"])
        elif cfg["model_type"] == "ernie4_5_moe":
            last, inter = cfg["moe_layer_end_index"], cfg["moe_intermediate_size"]
            inside = cfg["moe_layer_start_index"] <= i <= (L - 1 if last == -1 else last)
            if not inside or (i + 1) % cfg["moe_layer_interval"]:
                yield from mlp(f"{p}.mlp", cfg["intermediate_size"])
                continue
            yield f"{p}.mlp.gate.weight", (cfg["moe_num_experts"], H), "float32 router"
            statics = f"{p}.mlp.moe_statics.e_score_correction_bias"
            yield statics, (1, cfg["moe_num_experts"]), "correction"
            for e in range(cfg["moe_num_experts"]):
                yield from mlp(f"{p}.mlp.experts.{e}", inter)
            if cfg["moe_num_shared_experts"]:
                yield from mlp(f"{p}.mlp.shared_experts", inter * cfg["moe_num_shared_experts"])
        elif is_dense(cfg, i):
            yield from mlp(f"{p}.mlp", cfg["intermediate_size"])
        else:
            yield f"{p}.mlp.gate.weight", (cfg["n_routed_experts"], H), "router"
            correction = f"{p}.mlp.gate.e_score_correction_bias"
            if cfg["model_type"] != "deepseek_v2":
                yield correction, (cfg["n_routed_experts"],), "correction"
            for e in range(cfg["n_routed_experts"]):
                yield from mlp(f"{p}.mlp.experts.{e}", cfg["moe_intermediate_size"])
            yield from mlp(
                f"{p}.mlp.shared_experts", cfg["moe_intermediate_size"] * cfg["n_shared_experts"]
            )


LATENT = ("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite")


def is_dense(cfg: dict, layer: int) -> bool:
    kinds = cfg.get("mlp_layer_types")
    if kinds:
        return kinds[layer] == "dense"
    return layer < cfg.get("first_k_dense_replace", 1)


def latent_specs(cfg: dict, a: str):
    """Attention whose keys and values are made of a latent vector."""
    H, A, rank = cfg["hidden_size"], cfg["num_attention_heads"], cfg["kv_lora_rank"]
    plain, turned, V = cfg["qk_nope_head_dim"], cfg["qk_rope_head_dim"], cfg["v_head_dim"]
    has_bias = cfg.get("attention_bias")
    if cfg["q_lora_rank"] is None:
        yield f"{a}.q_proj.weight", (A * (plain + turned), H), "linear"
    else:
        yield f"{a}.q_a_proj.weight", (cfg["q_lora_rank"], H), "linear"
        if has_bias:
            yield f"{a}.q_a_proj.bias", (cfg["q_lora_rank"],), "bias"
        yield f"{a}.q_a_layernorm.weight", (cfg["q_lora_rank"],), "norm"
        yield f"{a}.q_b_proj.weight", (A * (plain + turned), cfg["q_lora_rank"]), "linear"
    yield f"{a}.kv_a_proj_with_mqa.weight", (rank + turned, H), "linear"
    yield f"{a}.kv_a_layernorm.weight", (rank,), "norm"
    yield f"{a}.kv_b_proj.weight", (A * (plain + V), rank), "linear"
    yield f"{a}.o_proj.weight", (H, A * V), "linear"
    if has_bias:
        yield f"{a}.kv_a_proj_with_mqa.bias", (rank + turned,), "bias"
        yield f"{a}.o_proj.bias", (H,), "bias"


def fuse_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Per-expert names -> mlp.experts.gate_up_proj [E, 2I, H] (gate first), down_proj [E, H, I]."""
    out, banks = {}, {}
    for name, t in tensors.items():
        head, sep, tail = name.partition(".mlp.experts.")
        if not sep:
            out[name] = t
            continue
        e, proj, _ = tail.split(".")
        banks.setdefault(head, {}).setdefault(int(e), {})[proj] = t
    for head, bank in banks.items():
        rows = [bank[e] for e in range(len(bank))]
        out[f"{head}.mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat([r["gate_proj"], r["up_proj"]]) for r in rows]
        )
        out[f"{head}.mlp.experts.down_proj"] = torch.stack([r["down_proj"] for r in rows])
    return out


def draw(seed: int, name: str, shape, mean: float, std: float) -> torch.Tensor:
    rng = np.random.RandomState((seed * 1_000_003 + zlib.crc32(name.encode())) & 0xFFFFFFFF)
    return torch.from_numpy((mean + std * rng.standard_normal(shape)).astype(np.float32))


def scaled(matrix: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """float8 and the scale of each block, whose largest value becomes float8's."""
    blocks = matrix.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).transpose(1, 2)
    scales = blocks.abs().amax((2, 3)) / 448.0
    small = (blocks / scales[:, :, None, None]).to(torch.float8_e4m3fn)
    return small.transpose(1, 2).reshape(matrix.shape).contiguous(), scales


_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def microscaled(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """MXFP4 of [.., columns]: blocks [.., columns / 32, 16] and scales [.., columns / 32]."""
    blocks = matrix.unflatten(-1, (-1, 32))
    exponents = torch.floor(torch.log2(blocks.abs().amax(-1, keepdim=True))) - 2
    small = blocks / 2.0**exponents
    codes = (small.abs().unsqueeze(-1) - _E2M1).abs().argmin(-1) + 8 * (small < 0)
    pairs = codes[..., 0::2] + 16 * codes[..., 1::2]
    return pairs.to(torch.uint8), (exponents.squeeze(-1) + 127).to(torch.uint8)


def from_microscaled(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The numbers that are stored, float32."""
    signed = torch.cat((_E2M1, -_E2M1))
    codes = torch.stack((blocks % 16, blocks // 16), -1).flatten(-2).long()
    return (signed[codes] * 2.0 ** (scales.float() - 127).unsqueeze(-1)).flatten(-2)


def make_state_dict(variant: dict) -> dict[str, torch.Tensor]:
    cfg, seed, out = variant["config"], variant["seed"], {}
    is_softmax = cfg["model_type"] == "ernie4_5_moe"
    router_gain = 1.0 if "correction_bias" in variant and not is_softmax else 2.0
    for name, shape, kind in tensor_specs(cfg):
        fan_in = shape[-1]
        if kind == "norm":
            mean, std = 1.0, 0.2
        elif kind in ("bias", "centred norm"):
            mean, std = 0.0, 0.2
        elif kind == "rate":
            mean, std = -1.5, 1.0
        elif kind == "conv":
            mean, std = 0.0, 1.4 / fan_in**0.5
        elif kind == "sink":
            mean, std = 0.0, 1.5
        elif kind == "transposed":
            mean, std = 0.0, 1.4 / shape[-2] ** 0.5
        elif kind == "correction":
            _, mean, std = variant["correction_bias"]
        elif kind == "embed":
            mean, std = 0.0, variant.get("embed_std", 1.0)
        elif kind == "head":
            mean, std = 0.0, 1.0
        elif kind in ("router", "float32 router"):
            mean, std = 0.0, router_gain / fan_in**0.5
        elif kind == "query":
            mean, std = 0.0, 1.5 / fan_in**0.5
        else:
            mean, std = 0.0, 1.4 / fan_in**0.5
        t = draw(seed, name, shape, mean, std)
        if kind not in ("correction", "float32 router"):
            t = t.to(getattr(torch, variant.get("store", "float32")))
        if kind == "linear" and "scaled_block" in variant:
            t, out[f"{name}_scale_inv"] = scaled(t.float(), *variant["scaled_block"])
        if kind == "transposed" and "mxfp4" in variant:
            out[f"{name}_blocks"], out[f"{name}_scales"] = microscaled(t.float().transpose(1, 2))
            continue
        out[name] = t
    if variant.get("ahead"):  # of the layer that predicts the token after the next one
        name = f"model.layers.{cfg['num_hidden_layers']}.eh_proj.weight"
        width = cfg["hidden_size"]
        out[name] = draw(seed, name, (width, 2 * width), 0.0, 1.0)
    if "extra" in variant:
        out[variant["extra"]] = draw(seed, variant["extra"], (64, 128), 0.0, 1.0)
    return fuse_experts(out) if variant.get("fused") else out


# --------------------------------------------------------------------------------------
# A tiny byte-level tokenizer, so that a served checkpoint can take text
# --------------------------------------------------------------------------------------

SPECIALS = [
    "<|padding|>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
_CORPUS = (
    "the quick brown fox jumps over the lazy dog and then the other fox sits down to eat "
    "a small piece of bread while the rain falls on the roof of the old house near the river "
    "where people walk every day to see the boats and to talk about what they have been doing "
    "since the last time they met there was not much to say but it was good to say it anyway "
)


def _byte_alphabet() -> list[str]:
    keep = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    table, extra = {}, 0
    for b in range(256):
        if b in keep:
            table[b] = chr(b)
        else:
            table[b] = chr(256 + extra)
            extra += 1
    return [table[b] for b in range(256)]


def write_tokenizer(path: Path) -> None:
    alphabet = _byte_alphabet()
    words: dict[tuple[str, ...], int] = {}
    for i, w in enumerate(_CORPUS.split()):
        key = tuple(alphabet[b] for b in ((b" " if i else b"") + w.encode()))
        words[key] = words.get(key, 0) + 1
    vocab = SPECIALS + alphabet
    merges: list[list[str]] = []
    while len(vocab) < VOCAB:
        counts: dict[tuple[str, str], int] = {}
        for key, n in words.items():
            for pair in itertools.pairwise(key):
                counts[pair] = counts.get(pair, 0) + n
        if not counts:
            break
        best = max(counts, key=lambda p: (counts[p], p))
        merged = "".join(best)
        merges.append(list(best))
        if merged not in vocab:
            vocab.append(merged)
        new_words: dict[tuple[str, ...], int] = {}
        for key, n in words.items():
            parts, j = [], 0
            while j < len(key):
                if j + 1 < len(key) and (key[j], key[j + 1]) == best:
                    parts.append(merged)
                    j += 2
                else:
                    parts.append(key[j])
                    j += 1
            new_words[tuple(parts)] = new_words.get(tuple(parts), 0) + n
        words = new_words
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    tok = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": s, **flags} for i, s in enumerate(SPECIALS)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {t: i for i, t in enumerate(vocab)},
            "merges": merges,
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(tok, ensure_ascii=False))
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": SPECIALS[BOS],
                "eos_token": SPECIALS[EOS],
                "pad_token": SPECIALS[PAD],
                "clean_up_tokenization_spaces": False,
                "model_max_length": 512,
                "chat_template": CHAT_TEMPLATE,
            },
            indent=2,
        )
    )


# --------------------------------------------------------------------------------------
# Writing a checkpoint directory
# --------------------------------------------------------------------------------------


def write_checkpoint(variant: dict, path: Path) -> None:
    cfg = variant["config"]
    tensors = make_state_dict(variant)
    path.mkdir(parents=True, exist_ok=True)
    if variant.get("legacy_config"):
        (path / "config.json").write_text(json.dumps(cfg, indent=2, sort_keys=True) + "\n")
        n, names = variant.get("shards", 1), list(tensors)
        if n == 1:
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        else:
            weight_map = {}
            for i in range(n):
                file = f"model-{i + 1:05d}-of-{n:05d}.safetensors"
                part = names[i * len(names) // n : (i + 1) * len(names) // n]
                save_file({k: tensors[k] for k in part}, path / file, metadata={"format": "pt"})
                weight_map |= dict.fromkeys(part, file)
            total = sum(t.numel() * t.element_size() for t in tensors.values())
            (path / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
                + "\n"
            )
    else:
        with tempfile.TemporaryDirectory() as tmp:
            (Path(tmp) / "config.json").write_text(json.dumps(cfg))
            save_file(tensors, Path(tmp) / "model.safetensors", metadata={"format": "pt"})
            model = model_class(cfg).from_pretrained(tmp, dtype=torch.float32)
            kwargs = (
                {"max_shard_size": variant["max_shard_size"]} if "max_shard_size" in variant else {}
            )
            model.save_pretrained(path, **kwargs)
    write_tokenizer(path)


def read_checkpoint(path: Path) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for f in sorted(path.glob("model*.safetensors")):
        out.update(load_file(f))
    return out


def write_plain(path: Path, out: Path) -> None:
    """The same model without scales, in float32: transformers needs one more package for them."""
    tensors = read_checkpoint(path)
    for name in [name for name in tensors if name.endswith("_blocks")]:
        plain = name.removesuffix("_blocks")
        found = from_microscaled(tensors.pop(name), tensors.pop(f"{plain}_scales"))
        tensors[plain] = found.transpose(1, 2)
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}
    config = json.loads((path / "config.json").read_text())
    block = torch.ones(config.pop("quantization_config").get("weight_block_size", [1, 1]))
    for name, found in scales.items():
        name = name.removesuffix("_scale_inv")
        tensors[name] = tensors[name].float() * torch.kron(found, block)
    (out / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})


def load_model(path: Path, cfg: dict, dtype=torch.float32):
    cls = model_class(cfg)
    kwargs = {}
    if cfg["model_type"] == "kimi_k2":  # transformers knows its math by another name
        known = cfg | {"model_type": "deepseek_v3"}
        with tempfile.TemporaryDirectory() as plain:
            for file in path.glob("model*"):
                (Path(plain) / file.name).symlink_to(file.resolve())
            (Path(plain) / "config.json").write_text(json.dumps(known))
            return load_model(Path(plain), known, dtype)
    if "quantization_config" in cfg:
        with tempfile.TemporaryDirectory() as plain:
            write_plain(path, Path(plain))
            return cls.from_pretrained(plain, dtype=dtype).eval()
    if V4:
        # config.json written by version 5 has rope_parameters, which version 4 does not read
        config = cls.config_class.from_pretrained(path)
        rope = dict(cfg.get("rope_parameters") or cfg.get("rope_scaling") or {})
        config.rope_theta = rope.pop("rope_theta", None) or cfg["rope_theta"]
        config.rope_scaling = (
            rope if rope.get("rope_type", rope.get("type", "default")) != "default" else None
        )
        kwargs["config"] = config
    return cls.from_pretrained(path, dtype=dtype, **kwargs).eval()


# --------------------------------------------------------------------------------------
# Recording
# --------------------------------------------------------------------------------------


class RouterRecorder:
    """Collects, per routed layer, the chosen expert ids (ascending) and their weights.

    gap is the smallest distance between the worst chosen and the best refused selection
    score seen since the last reset (and, with groups, between worst kept and best refused
    group): how far the golden is from a routing tie.
    """

    def __init__(self, model, cfg: dict):
        self.cfg, self.layers, self.logits, self.gap = cfg, {}, {}, float("inf")
        for name, mod in model.named_modules():
            kind = type(mod).__name__
            if kind == "GptOssTopKRouter":
                mod.register_forward_hook(self._gpt_oss(name))
            elif kind in (
                *("OlmoeTopKRouter", "Qwen3MoeTopKRouter", "MixtralTopKRouter"),
                *("FlexOlmoTopKRouter", "Qwen3NextTopKRouter", "Qwen3_5MoeTopKRouter"),
            ):
                mod.register_forward_hook(self._olmoe(name))
            elif kind in (
                *("Dots1TopkRouter", "Glm4MoeTopkRouter", "MiniMaxM2TopKRouter"),
                *("DeepseekV3TopkRouter", "Glm4MoeLiteTopkRouter"),
            ):
                mod.register_forward_hook(self._dots(name))
            elif kind == "DeepseekV2TopkRouter":
                mod.register_forward_hook(self._deepseek2(name))
            elif kind == "Ernie4_5_MoeTopKRouter":
                mod.register_forward_hook(self._ernie(name))
            elif kind == "JetMoeTopKGating":
                mod.register_forward_hook(self._jetmoe(name))

    def reset(self):
        self.layers, self.logits, self.gap = {}, {}, float("inf")

    def _put(self, name, ids, weights, selection, logits):
        self.logits.setdefault(name, []).append(logits.float())
        ids, order = ids.sort(dim=-1)
        weights = weights.float().gather(-1, order)
        old = self.layers.setdefault(name, [])
        old.append((ids.int(), weights))
        k = ids.shape[-1]
        if selection.shape[-1] > k:
            top = selection.float().topk(k + 1, dim=-1)[0]
            self.gap = min(self.gap, (top[:, k - 1] - top[:, k]).min().item())

    def _olmoe(self, name):
        def hook(mod, args, out):
            logits, weights, ids = out
            self._put(name, ids, weights, logits, logits)

        return hook

    def _dots(self, name):
        def hook(mod, args, out):
            if not isinstance(out, tuple) or len(out) != 3:  # version 4 returns (ids, weights)
                return
            logits, weights, ids = out
            given = args[1] if len(args) > 1 else mod.e_score_correction_bias
            choice = logits.sigmoid() + given
            groups = self.cfg.get("n_group") or 1
            keep = self.cfg.get("topk_group") or 1
            if groups > keep:
                per = choice.view(choice.shape[0], groups, -1)
                score = per.topk(2, dim=-1)[0].sum(-1)
                top, idx = score.topk(keep + 1, dim=-1)
                self.gap = min(self.gap, (top[:, keep - 1] - top[:, keep]).min().item())
                mask = torch.zeros_like(score).scatter_(1, idx[:, :keep], 1.0).bool()
                choice = per.masked_fill(~mask.unsqueeze(-1), float("-inf")).flatten(1)
            self._put(name, ids, weights, choice, logits)

        return hook

    def _deepseek2(self, name):
        def hook(mod, args, out):
            logits, weights, ids = out
            choice, keep = logits, mod.topk_group or 1
            if mod.topk_method == "group_limited_greedy" and mod.num_group > keep:
                per = logits.view(len(logits), mod.num_group, -1)
                top, idx = per.amax(-1).topk(keep + 1, dim=-1)
                self.gap = min(self.gap, (top[:, keep - 1] - top[:, keep]).min().item())
                mask = torch.zeros(per.shape[:2]).scatter_(1, idx[:, :keep], 1.0).bool()
                choice = per.masked_fill(~mask.unsqueeze(-1), float("-inf")).flatten(1)
            self._put(name, ids, weights, choice, logits)

        return hook

    def _gpt_oss(self, name):
        def hook(mod, args, out):
            logits, weights, ids = out
            self._put(name, ids, weights, logits, logits)

        return hook

    def _ernie(self, name):
        def hook(mod, args, out):
            logits, weights, ids = out
            choice = logits.softmax(-1) + mod.moe_statics.e_score_correction_bias.squeeze()
            self._put(name, ids, weights, choice, logits)

        return hook

    def _jetmoe(self, name):
        def hook(mod, args, out):
            logits = out[-1]
            top, ids = logits.topk(mod.top_k, dim=-1)
            self._put(name, ids, torch.softmax(top, dim=-1), logits, logits)

        return hook

    def stacked(self) -> dict[str, torch.Tensor]:
        """{"router": [layers, tokens, k]} or, for JetMoE, router_attn and router_mlp."""
        out: dict[str, tuple[list, list, list]] = {}
        for name, chunks in self.layers.items():
            key = "router"
            if "self_attention" in name:
                key = "router_attn"
            elif self.cfg["model_type"] == "jetmoe":
                key = "router_mlp"
            ids, weights, logits = out.setdefault(key, ([], [], []))
            ids.append(torch.cat([c[0] for c in chunks]))
            weights.append(torch.cat([c[1] for c in chunks]))
            logits.append(torch.cat(self.logits[name]))
        res = {}
        for key, (ids, weights, logits) in out.items():
            res[f"{key}_ids"] = torch.stack(ids)
            res[f"{key}_weights"] = torch.stack(weights)
            res[f"{key}_logits"] = torch.stack(logits)
        return res


def prompts(seed: int) -> list[torch.Tensor]:
    rng = np.random.RandomState(seed + 77_000)
    return [
        torch.from_numpy(rng.randint(FIRST_PLAIN_ID, VOCAB, size=n).astype(np.int64))
        for n in PROMPT_LENS
    ]


@torch.no_grad()
def greedy(model, ids: torch.Tensor, steps: int):
    """Cached greedy decoding that never stops at eos.  Returns first (prefill) output too."""
    out = model(input_ids=ids[None], use_cache=True, output_hidden_states=True)
    prefill_logits, hidden = (
        out.logits[0].float(),
        torch.stack([h[0] for h in out.hidden_states]).float(),
    )
    tokens, margins, logprobs = [], [], []
    last = prefill_logits[-1]
    for step in range(steps):
        top = last.topk(2)
        tokens.append(int(top.indices[0]))
        margins.append(float(top.values[0] - top.values[1]))
        logprobs.append(float(torch.log_softmax(last.double(), -1)[tokens[-1]]))
        if step + 1 == steps:
            break
        out = model(
            input_ids=torch.tensor([[tokens[-1]]]),
            past_key_values=out.past_key_values,
            use_cache=True,
        )
        last = out.logits[0, -1].float()
    return (
        prefill_logits,
        hidden,
        torch.tensor(tokens),
        torch.tensor(margins),
        torch.tensor(logprobs),
    )


@torch.no_grad()
def record_batch(model, variant: dict) -> dict[str, torch.Tensor]:
    """One right-padded batch with router outputs.  aux_loss is the version-5 value; aux_loss_v4
    counts JetMoE's attention routers once per layer, as version 4 did (version 5 does it twice)."""
    ids, mask = pad_rows([r for r in prompts(variant["seed"]) if len(r) in (7, 16, 40)], left=False)
    out = {"batch.input_ids": ids, "batch.attention_mask": mask}
    for tag, m in (("", mask), ("_nomask", None)):
        got = model(input_ids=ids, attention_mask=m, output_router_logits=True)
        if not tag:
            out["batch.logits"] = got.logits.float()
        if getattr(got, "aux_loss", None) is None:
            continue  # dots.llm1 has no auxiliary loss
        out[f"batch.aux_loss{tag}"] = got.aux_loss.float().reshape(1)
        if variant["config"]["model_type"] == "jetmoe":
            gates = got.router_logits
            if not V4:
                gates = tuple(g for i, g in enumerate(gates) if i % 3)
            func = sys.modules[type(model).__module__].load_balancing_loss_func
            out[f"batch.aux_loss_v4{tag}"] = (
                func(gates, model.num_experts, model.num_experts_per_tok, m).float().reshape(1)
            )
    return out


def pad_rows(rows, left: bool):
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for j, r in enumerate(rows):
        where = slice(width - len(r), width) if left else slice(0, len(r))
        ids[j, where], mask[j, where] = r, 1
    return ids, mask


def record_lm(name: str, variant: dict, path: Path) -> dict:
    cfg = variant["config"]
    model = load_model(path, cfg)
    rec = RouterRecorder(model, cfg)
    tensors: dict[str, torch.Tensor] = {}
    stats = {
        "min_margin": float("inf"),
        "min_router_gap": float("inf"),
        "distinct_tokens": 0,
        "logit_std": 0.0,
    }
    seen = set()
    for i, ids in enumerate(prompts(variant["seed"])):
        rec.reset()
        logits, hidden, toks, margins, logprobs = greedy(model, ids, NEW_TOKENS)
        routed = rec.stacked()  # prompt tokens followed by the 31 fed-back tokens
        p = f"p{i}"
        tensors[f"{p}.prompt_ids"] = ids
        tensors[f"{p}.logits"] = logits
        tensors[f"{p}.hidden_states"] = hidden
        tensors[f"{p}.greedy_ids"] = toks
        tensors[f"{p}.greedy_margin"] = margins
        tensors[f"{p}.greedy_logprob"] = logprobs
        for key, value in routed.items():
            tensors[f"{p}.{key}"] = value
        stats["min_margin"] = min(stats["min_margin"], margins.min().item())
        stats["min_router_gap"] = min(stats["min_router_gap"], rec.gap)
        stats["logit_std"] = max(stats["logit_std"], logits.std().item())
        seen.update(toks.tolist())
    stats["distinct_tokens"] = len(seen)
    if not variant.get("alone"):
        tensors |= record_batch(model, variant)
    if variant.get("bf16"):
        half = load_model(path, cfg, torch.bfloat16)
        worst, median, same = 0.0, [], 0
        for i, ids in enumerate(prompts(variant["seed"])):
            logits, hidden, toks, margins, logprobs = greedy(half, ids, NEW_TOKENS)
            tensors[f"p{i}.logits_bf16"] = logits
            tensors[f"p{i}.hidden_states_bf16"] = hidden
            tensors[f"p{i}.greedy_ids_bf16"] = toks
            tensors[f"p{i}.greedy_margin_bf16"] = margins
            diff = (logits - tensors[f"p{i}.logits"]).abs()
            worst, same = (
                max(worst, diff.max().item()),
                same + bool((toks == tensors[f"p{i}.greedy_ids"]).all()),
            )
            median.append(diff.flatten())
        stats |= {
            "bf16_max_abs_diff_to_fp32": worst,
            "bf16_median_abs_diff_to_fp32": torch.cat(median).median().item(),
            "bf16_same_greedy": same,
        }
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path / "golden.safetensors")
    return stats


SEQCLS_BATCHES = ("right_padded", "left_padded", "right_padded_no_mask", "pad_as_text")


def seqcls_inputs(
    seed: int, padded: bool = True
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    rows = [r for r in prompts(seed) if len(r) in (1, 7, 16, 40)]
    if not padded:
        return {}
    right, rmask = pad_rows(rows, left=False)
    left, lmask = pad_rows(rows, left=True)
    trailing = rows[2].clone()
    trailing[-3:] = PAD  # pad id used as ordinary text: pooling moves to the last other token
    return {
        "right_padded": (right, rmask),
        "left_padded": (left, lmask),
        "right_padded_no_mask": (right, None),
        "pad_as_text": (trailing[None], torch.ones(1, len(trailing), dtype=torch.long)),
    }


def margin(logits: torch.Tensor) -> torch.Tensor:
    top = logits.topk(2, dim=-1)[0]
    return top[..., 0] - top[..., 1]


def record_seqcls(name: str, variant: dict, path: Path) -> dict:
    cfg = variant["config"]
    model = load_model(path, cfg)
    tensors, spread = {}, float("inf")
    for key, (ids, mask) in seqcls_inputs(
        variant["seed"], "pad_token_id" in variant["config"]
    ).items():
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=mask).logits.float()
        tensors[f"{key}.input_ids"] = ids
        if mask is not None:
            tensors[f"{key}.attention_mask"] = mask
        tensors[f"{key}.logits"] = out
        spread = min(spread, margin(out).min().item())
    for i, ids in enumerate(prompts(variant["seed"])):
        with torch.no_grad():
            out = model(input_ids=ids[None]).logits[0].float()
        tensors[f"p{i}.prompt_ids"], tensors[f"p{i}.logits"] = ids, out
    save_file({k: v.clone().contiguous() for k, v in tensors.items()}, path / "golden.safetensors")
    return {"min_label_margin": spread if spread != float("inf") else None}


# --------------------------------------------------------------------------------------
# Verification: single vs batched, every experts/attention implementation, any version
# --------------------------------------------------------------------------------------


@torch.no_grad()
def verify_lm(name: str, variant: dict, path: Path) -> dict:
    cfg, want = variant["config"], load_file(path / "golden.safetensors")
    n = len(PROMPT_LENS)
    res = {}
    if read_checkpoint(path).keys() != make_state_dict(variant).keys():
        raise SystemExit(f"{name}: tensor names on disk differ from the layout in this file")
    if V4 and (variant.get("v5_only") or variant.get("fused")):
        return {"skipped": "differs in version 4 by design"}
    model = load_model(path, cfg)

    def diff_single():
        worst, same = 0.0, 0
        for i in range(n):
            logits, _, toks, _, _ = greedy(model, want[f"p{i}.prompt_ids"], NEW_TOKENS)
            worst = max(worst, (logits - want[f"p{i}.logits"]).abs().max().item())
            same += bool((toks == want[f"p{i}.greedy_ids"]).all())
        return worst, same

    settings = [("default", None, None)]
    if hasattr(model, "set_experts_implementation"):
        if cfg["model_type"] != "jetmoe":
            settings += [
                (f"experts={e}", "experts", e) for e in ("eager", "batched_mm", "grouped_mm")
            ]
        settings += [("attn=eager", "attn", "eager")]
    for label, what, value in settings:
        if what == "experts":
            model.set_experts_implementation(value)
        elif what == "attn":
            model.set_attn_implementation(value)
        worst, same = diff_single()
        res[label] = f"logits max|d|={worst:.1e} greedy {same}/{n}"
        if same != n or worst > 1e-3:
            raise SystemExit(f"{name}: {label}: {res[label]}")
    if hasattr(model, "set_attn_implementation") and len(settings) > 1:
        model.set_attn_implementation("sdpa")

    rows = [want[f"p{i}.prompt_ids"] for i in range(n)]
    ids, mask = pad_rows(rows, left=True)
    width = ids.shape[1]
    common = {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": PAD,
        "eos_token_id": None,
    }
    model.config.output_router_logits = (
        False  # generate() of 5.23 fails on the auxiliary loss with a cache
    )
    batch = (
        None
        if variant.get("alone")
        else model.generate(input_ids=ids, attention_mask=mask, **common)[:, width:]
    )
    single = torch.stack(
        [
            model.generate(
                input_ids=r[None], attention_mask=torch.ones(1, len(r), dtype=torch.long), **common
            )[0, len(r) :]
            for r in rows
        ]
    )
    gold = torch.stack([want[f"p{i}.greedy_ids"] for i in range(n)])
    if batch is None:
        batch = gold
    res["generate"] = (
        f"single {int((single == gold).all(1).sum())}/{n} "
        f"batched {int((batch == gold).all(1).sum())}/{n}"
    )
    if not ((single == gold).all() and (batch == gold).all()):
        raise SystemExit(f"{name}: generate: {res['generate']}")
    return res


@torch.no_grad()
def verify_seqcls(name: str, variant: dict, path: Path) -> dict:
    want, model, worst = (
        load_file(path / "golden.safetensors"),
        load_model(path, variant["config"]),
        0.0,
    )
    for key, (ids, mask) in seqcls_inputs(
        variant["seed"], "pad_token_id" in variant["config"]
    ).items():
        got = model(input_ids=ids, attention_mask=mask).logits.float()
        worst = max(worst, (got - want[f"{key}.logits"]).abs().max().item())
    rows = [f"p{i}.logits" for i, n in enumerate(PROMPT_LENS) if n in (1, 7, 16, 40)]
    alone = torch.stack([want[k] for k in rows])
    batches = [want[f"{k}.logits"] for k in SEQCLS_BATCHES[:3] if f"{k}.logits" in want]
    padded = max([(b - alone).abs().max().item() for b in batches], default=0.0)
    if worst > 1e-3 or padded > 1e-3:
        raise SystemExit(f"{name}: {worst:.1e} {padded:.1e}")
    return {"default": f"logits max|d|={worst:.1e}", "padded vs alone": f"max|d|={padded:.1e}"}


# --------------------------------------------------------------------------------------


def main() -> None:
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("out", type=Path)
    ap.add_argument("--only", nargs="*", help="variant name prefixes")
    ap.add_argument(
        "--verify", action="store_true", help="re-check an existing directory, write nothing"
    )
    ap.add_argument("--list", action="store_true")
    ap.add_argument("--threads", type=int, default=1)
    args = ap.parse_args()
    torch.set_num_threads(args.threads)
    names = [n for n in VARIANTS if not args.only or any(n.startswith(p) for p in args.only)]
    if args.list:
        print("\n".join(names))
        return
    summary = {}
    for name in names:
        variant, path, t0 = VARIANTS[name], args.out / name, time.time()
        if args.verify:
            res = (verify_seqcls if variant.get("seqcls") else verify_lm)(name, variant, path)
        else:
            if path.exists():
                shutil.rmtree(path)
            write_checkpoint(variant, path)
            res = (record_seqcls if variant.get("seqcls") else record_lm)(name, variant, path)
            size = sum(f.stat().st_size for f in path.glob("model*.safetensors"))
            if size > 6_000_000:
                raise SystemExit(f"{name}: checkpoint of {size} bytes is over the 6 MB limit")
            res = {"checkpoint_bytes": size, **res}
            meta = {
                "variant": name,
                "seed": variant["seed"],
                "prompt_lens": list(PROMPT_LENS),
                "new_tokens": NEW_TOKENS,
                "transformers": transformers.__version__,
                "torch": torch.__version__,
                **res,
            }
            (path / "golden.json").write_text(json.dumps(meta, indent=2) + "\n")
        summary[name] = res
        print(f"{name}: {time.time() - t0:.1f}s {json.dumps(res)}", flush=True)
    print(
        f"{len(summary)} variants, transformers {transformers.__version__}, "
        f"torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
