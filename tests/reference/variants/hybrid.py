"""Of the families with recurrent states."""

from __future__ import annotations

from typing import Any

from tests.reference.variants.tokens import BOS, EOS, PAD, VOCAB

# The norm of what a state gives has almost nothing to divide by in places: a larger epsilon than
# that of the public checkpoints keeps differences from growing there.
_QWEN3_NEXT: dict[str, Any] = {
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
_QWEN35_TEXT: dict[str, Any] = {k: v for k, v in _QWEN3_NEXT.items() if k not in _NOT_IN_QWEN35} | {
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

VARIANTS: dict[str, dict[str, Any]] = {
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
}
