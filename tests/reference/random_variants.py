"""Goldens of random configs: every field of a family drawn at once, by a number.

The variants of ``reference/make_goldens.py`` are chosen by hand; these cover other combinations.
``python -m tests.reference.random_variants OUT --first 0 --count 6`` writes ``olmoe-random-0`` and
so on.
"""

# mypy: ignore-errors

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from tests.reference import make_goldens

FAMILIES = (
    *("olmoe", "dots1", "jetmoe", "qwen3moe", "glm4moe", "mixtral", "minimaxm2", "ernie45"),
    *("gptoss", "flexolmo", "deepseekv3", "deepseekv2", "glm4lite", "qwen3next", "qwen35moe"),
)
HYBRID = ("qwen3next", "qwen35moe")
LATENT = ("deepseekv3", "deepseekv2", "glm4lite")
MODEL_TYPES = {
    "qwen3moe": "qwen3_moe",
    "glm4moe": "glm4_moe",
    "minimaxm2": "minimax_m2",
    "ernie45": "ernie4_5_moe",
    "gptoss": "gpt_oss",
    "flexolmo": "flex_olmo",
    "deepseekv3": "deepseek_v3",
    "deepseekv2": "deepseek_v2",
    "glm4lite": "glm4_moe_lite",
    "qwen3next": "qwen3_next",
    "qwen35moe": "qwen3_5_moe_text",
}
"""Where they differ."""
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
MIN_MARGIN = 1e-3
"""Best logit minus the second: below it the next weights are tried."""
MIN_ROUTER_GAP = 2e-5
"""The same of the last chosen expert."""
MAX_TRIES = 8


def make_variant(family: str, number: int) -> dict:
    """What ``make_goldens.VARIANTS`` has, drawn by ``number``; the same on every machine."""
    rng = random.Random(f"{family}-{number}")
    makers = {
        "olmoe": _olmoe,
        "dots1": _dots1,
        "jetmoe": _jetmoe,
        "qwen3moe": _qwen3,
        "glm4moe": _glm4,
        "mixtral": _mixtral,
        "minimaxm2": _minimax,
        "ernie45": _ernie,
        "gptoss": _gpt_oss,
        "flexolmo": _flex_olmo,
        "deepseekv3": _deepseek3,
        "deepseekv2": _deepseek2,
        "glm4lite": _glm4_lite,
        "qwen3next": _qwen3_next,
        "qwen35moe": _qwen35,
    }
    config, extra = makers[family](rng)
    layers = rng.randint(1, 3)
    config |= {
        "model_type": MODEL_TYPES.get(family, family),
        "vocab_size": make_goldens.VOCAB,
        "num_hidden_layers": layers,
        "rms_norm_eps": rng.choice([1e-6, 1e-5, 1e-3, 0.05]),
        "tie_word_embeddings": rng.random() < 0.4,
        "pad_token_id": make_goldens.PAD,
        "eos_token_id": rng.choice([make_goldens.EOS, [make_goldens.EOS, 3]]),
        rng.choice(["torch_dtype", "dtype"]): rng.choice(["float32", "bfloat16"]),
        "output_router_logits": False,
    }
    head_dim = config.get("head_dim") or config.get("kv_channels") or config.get("qk_rope_head_dim")
    rope, is_dynamic = _rope(
        rng, head_dim or config["hidden_size"] // config["num_attention_heads"]
    )
    store = rng.choice(["float32", "float32", "bfloat16", "float16"])
    if family == "dots1":
        _dots1_layers(rng, config, layers)
    if family == "ernie45":
        config["moe_layer_start_index"] = rng.randint(0, layers - 1)
    if family == "qwen3moe":
        _qwen3_layers(rng, config, layers)
    if family in HYBRID:
        _hybrid_layers(rng, config, layers)
    if family == "qwen3next":
        _qwen3_layers(rng, config, layers)
        del config["use_sliding_window"], config["sliding_window"]
    if family == "gptoss" and rng.random() < 0.6:
        kinds = ("sliding_attention", "full_attention")
        config["layer_types"] = [rng.choice(kinds) for _ in range(layers)]
    if family in LATENT[:2]:
        config["first_k_dense_replace"] = rng.randint(0, layers - 1)
    if family == "glm4lite":
        kinds = [rng.choice(["dense", "sparse"]) for _ in range(layers)]
        config["mlp_layer_types"] = [*kinds[1:], "sparse"]
    if family == "glm4moe":
        config["first_k_dense_replace"] = rng.randint(0, layers - 1)
    if family == "glm4moe" or family in HYBRID:
        share = rng.choice([None, 0.25, 0.5, 0.75, 1.0])  # None: the class's half
        rope |= {} if share is None else {"partial_rotary_factor": share}
    return {
        "seed": 5000 + 100 * number + FAMILIES.index(family),
        "config": config | rope,
        "legacy_config": True,
        "alone": is_dynamic,
        "store": store,
        "shards": rng.choice([1, 1, 3]),
        "fused": family not in ("jetmoe", "mixtral", "minimaxm2", "gptoss") and rng.random() < 0.4,
        "embed_std": 0.5 if config["tie_word_embeddings"] else 1.0,
        **extra,
    }


def _olmoe(rng: random.Random) -> tuple[dict, dict]:
    heads, head_dim, experts = rng.choice([1, 2, 4, 6]), rng.choice([8, 12, 16]), rng.randint(2, 24)
    return {
        "architectures": ["OlmoeForCausalLM"],
        "hidden_size": heads * head_dim,
        "intermediate_size": rng.choice([8, 24, 40]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([k for k in (1, 2, 4, 6) if heads % k == 0]),
        "num_experts": experts,
        "num_experts_per_tok": rng.choice([1, 2, experts, rng.randint(1, experts)]),
        "norm_topk_prob": rng.random() < 0.5,
        "clip_qkv": rng.choice([None, 0.6, 3.0]),
        "attention_bias": rng.random() < 0.5,
        "hidden_act": rng.choice(ACTIVATIONS),
    }, {}


def _dots1(rng: random.Random) -> tuple[dict, dict]:
    groups, size = rng.choice([1, 1, 2, 4]), rng.randint(2, 6)
    top_groups = rng.randint(1, groups)
    heads = rng.choice([2, 4])
    config = {
        "architectures": ["Dots1ForCausalLM"],
        "hidden_size": rng.choice([32, 48, 64]),
        "intermediate_size": rng.choice([40, 96]),
        "moe_intermediate_size": rng.choice([8, 24]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([1, 2, heads]),
        "head_dim": rng.choice([8, 16, 20]),
        "n_routed_experts": groups * size,
        "n_shared_experts": rng.randint(1, 3),
        "num_experts_per_tok": rng.randint(1, top_groups * size),
        "n_group": groups,
        "topk_group": top_groups,
        "norm_topk_prob": rng.random() < 0.5,
        "routed_scaling_factor": rng.choice([0.5, 1.0, 2.5]),
        "attention_bias": rng.random() < 0.5,
        "hidden_act": rng.choice(ACTIVATIONS),
    }
    return config, {"correction_bias": ("normal", rng.choice([0.0, -1.5]), 0.15)}


def _gpt_oss(rng: random.Random) -> tuple[dict, dict]:
    heads, experts = rng.choice([2, 4, 6]), rng.randint(2, 12)
    return {
        "architectures": ["GptOssForCausalLM"],
        "hidden_size": rng.choice([32, 48, 64]),
        "intermediate_size": rng.choice([16, 40, 64]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([k for k in (1, 2, 4, 6) if heads % k == 0]),
        "head_dim": rng.choice([8, 16, 20]),
        "num_local_experts": experts,
        "num_experts_per_tok": rng.choice([1, 2, experts, rng.randint(1, experts)]),
        "sliding_window": rng.choice([2, 5, 30]),
        "swiglu_alpha": rng.choice([1.0, 1.702]),
        "swiglu_limit": rng.choice([0.5, 2.0, 7.0]),
        "attention_bias": rng.random() < 0.7,
    }, {}


def _flex_olmo(rng: random.Random) -> tuple[dict, dict]:
    config, extra = _olmoe(rng)
    del config["clip_qkv"]
    return config | {"architectures": ["FlexOlmoForCausalLM"]}, extra


def _dots1_layers(rng: random.Random, config: dict, layers: int) -> None:
    """Which layers are dense, and which have a window."""
    config["first_k_dense_replace"] = rng.randint(0, layers - 1)
    config["sliding_window"] = rng.choice([None, 2, 5, 30])  # 1: its cache keeps all keys
    config["max_window_layers"] = rng.randint(0, layers)
    if config["sliding_window"] and rng.random() < 0.5:
        kinds = ("sliding_attention", "full_attention")
        config["layer_types"] = [rng.choice(kinds) for _ in range(layers)]


def _qwen3(rng: random.Random) -> tuple[dict, dict]:
    heads, experts = rng.choice([2, 4, 6]), rng.randint(2, 24)
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": rng.choice([32, 48, 64]),
        "intermediate_size": rng.choice([40, 96]),
        "moe_intermediate_size": rng.choice([8, 24]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([k for k in (1, 2, 4, 6) if heads % k == 0]),
        "head_dim": rng.choice([8, 16, 20]),
        rng.choice(["num_experts", "num_local_experts"]): experts,
        "num_experts_per_tok": rng.choice([1, 2, experts, rng.randint(1, experts)]),
        "norm_topk_prob": rng.random() < 0.7,
        "attention_bias": rng.random() < 0.5,
        "hidden_act": rng.choice(ACTIVATIONS),
    }, {}


def _qwen3_layers(rng: random.Random, config: dict, layers: int) -> None:
    """Which layers are dense, one at least not, and whether there is a window."""
    config["decoder_sparse_step"] = rng.choice([1, 1, min(2, layers)])
    sparse = range(config["decoder_sparse_step"] - 1, layers, config["decoder_sparse_step"])
    config["mlp_only_layers"] = sorted(rng.sample(sparse, rng.randint(0, len(sparse) - 1)))
    config["use_sliding_window"] = rng.random() < 0.4
    config["sliding_window"] = rng.choice([2, 5, 30])


def _qwen3_next(rng: random.Random) -> tuple[dict, dict]:
    config, extra = _qwen3(rng)
    keys = rng.randint(1, 3)
    experts = config.pop("num_experts", None) or config.pop("num_local_experts")
    return config | {
        "architectures": ["Qwen3NextForCausalLM"],
        "head_dim": rng.choice([8, 16, 24]),
        "hidden_act": "silu",
        "num_experts": experts,
        "shared_expert_intermediate_size": rng.choice([8, 24]),
        "linear_num_key_heads": keys,
        "linear_num_value_heads": keys * rng.randint(1, 3),
        "linear_key_head_dim": rng.choice([4, 12, 16]),
        "linear_value_head_dim": rng.choice([8, 12, 20]),
        "linear_conv_kernel_dim": rng.randint(1, 5),
    }, extra


def _qwen35(rng: random.Random) -> tuple[dict, dict]:
    config, extra = _qwen3_next(rng)
    del config["intermediate_size"], config["norm_topk_prob"]
    return config | {"architectures": ["Qwen3_5MoeForCausalLM"]}, extra


def _hybrid_layers(rng: random.Random, config: dict, layers: int) -> None:
    """Which layers have a recurrent state. A small epsilon makes differences larger by far."""
    config["rms_norm_eps"] = rng.choice([1e-4, 1e-3, 0.05])
    if rng.random() < 0.5:
        config["full_attention_interval"] = rng.randint(1, layers)
        return
    kinds = [rng.choice(["linear_attention", "full_attention"]) for _ in range(layers)]
    kinds[rng.randrange(layers)] = "full_attention"
    config["layer_types"] = kinds


def _glm4(rng: random.Random) -> tuple[dict, dict]:
    config, extra = _dots1(rng)
    config |= {
        "architectures": ["Glm4MoeForCausalLM"],
        "use_qk_norm": rng.random() < 0.5,
        "head_dim": rng.choice([8, 16, 24]),
    }
    return config, extra


def _deepseek3(rng: random.Random) -> tuple[dict, dict]:
    config, extra = _dots1(rng)
    del config["head_dim"]
    config |= {
        "architectures": ["DeepseekV3ForCausalLM"],
        "num_key_value_heads": config["num_attention_heads"],
        "q_lora_rank": rng.choice([None, 12, 40]),
        "kv_lora_rank": rng.choice([10, 24, 33]),
        "qk_nope_head_dim": rng.choice([5, 8, 16]),
        "qk_rope_head_dim": rng.choice([4, 8, 12]),
        "v_head_dim": rng.choice([7, 8, 20]),
        "rope_interleave": rng.random() < 0.7,
    }
    return config, extra


def _deepseek2(rng: random.Random) -> tuple[dict, dict]:
    config, _ = _deepseek3(rng)
    del config["rope_interleave"]
    return config | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "norm_topk_prob": False,
        # transformers rotates views of pairs, which must begin at even places.
        "kv_lora_rank": rng.choice([10, 24, 34]),
        "qk_nope_head_dim": rng.choice([6, 8, 16]),
        "topk_method": rng.choice(["greedy", "group_limited_greedy"]),
    }, {}


def _glm4_lite(rng: random.Random) -> tuple[dict, dict]:
    config, extra = _deepseek3(rng)
    return config | {"architectures": ["Glm4MoeLiteForCausalLM"]}, extra


def _mixtral(rng: random.Random) -> tuple[dict, dict]:
    heads, experts = rng.choice([2, 4, 6]), rng.randint(2, 9)
    return {
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": rng.choice([32, 48, 64]),
        "intermediate_size": rng.choice([8, 24]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([k for k in (1, 2, 4, 6) if heads % k == 0]),
        "head_dim": rng.choice([8, 16, 20]),
        "num_local_experts": experts,
        "num_experts_per_tok": rng.choice([1, 2, experts, rng.randint(1, experts)]),
        "sliding_window": rng.choice([None, None, 2, 5, 30]),
        "hidden_act": rng.choice(ACTIVATIONS),
    }, {}


def _minimax(rng: random.Random) -> tuple[dict, dict]:
    config, _ = _mixtral(rng)
    del config["sliding_window"]
    config |= {
        "architectures": ["MiniMaxM2ForCausalLM"],
        "head_dim": rng.choice([8, 16, 24]),
        "rotary_dim": rng.choice([4, 8]),
    }
    return config, {"correction_bias": ("normal", rng.choice([0.0, -1.5]), 0.15)}


def _ernie(rng: random.Random) -> tuple[dict, dict]:
    heads, experts = rng.choice([2, 4, 6]), rng.randint(2, 24)
    config = {
        "architectures": ["Ernie4_5_MoeForCausalLM"],
        "hidden_size": rng.choice([32, 48, 64]),
        "intermediate_size": rng.choice([40, 96]),
        "moe_intermediate_size": rng.choice([8, 24]),
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([k for k in (1, 2, 4, 6) if heads % k == 0]),
        "head_dim": rng.choice([8, 16, 20]),
        "moe_num_experts": experts,
        "moe_num_shared_experts": rng.randint(0, 2),
        "moe_k": rng.choice([1, 2, experts, rng.randint(1, experts)]),
        "moe_norm_min": rng.choice([1e-12, 0.3]),
        "moe_layer_start_index": 0,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "hidden_act": rng.choice(ACTIVATIONS),
    }
    return config, {"correction_bias": ("normal", 0.0, 0.05)}


def _jetmoe(rng: random.Random) -> tuple[dict, dict]:
    experts = rng.randint(2, 9)
    return {
        "architectures": [rng.choice(["JetMoeForCausalLM", "JetMoEForCausalLM"])],
        "hidden_size": rng.choice([32, 48, 80]),
        "intermediate_size": rng.choice([16, 48]),
        "num_key_value_heads": rng.randint(1, 4),
        "kv_channels": rng.choice([8, 16, 24]),
        "num_local_experts": experts,
        "num_experts_per_tok": rng.choice([1, 2, experts, rng.randint(1, experts)]),
        "activation_function": rng.choice(ACTIVATIONS),
    }, {}


def _rope(rng: random.Random, head_dim: int) -> tuple[dict, bool]:
    """Config keys in either spelling, and whether positions beyond the context are stretched."""
    kind = rng.choice(["default", "linear", "dynamic", "yarn", "llama3"])
    context = 48 if kind == "dynamic" else 256
    scaling: dict = {"factor": rng.choice([2.0, 4.0, 8.0])}
    if kind == "dynamic":
        scaling = {"factor": 4.0}
    elif kind == "yarn":
        scaling |= {"original_max_position_embeddings": rng.choice([32, 64])}
        scaling |= rng.choice([{}, {"beta_fast": 4.0, "beta_slow": 0.5}])
        scaling |= rng.choice([{}, {"truncate": False}])
        scaling |= rng.choice(
            [{}, {"attention_factor": 1.3}, {"mscale": 1.0, "mscale_all_dim": 0.6}]
        )
    elif kind == "llama3":
        scaling |= {
            "low_freq_factor": rng.choice([1.0, 1.5]),
            "high_freq_factor": rng.choice([2.0, 4.0]),
            "original_max_position_embeddings": rng.choice([16, 64]),
        }
    theta, found = rng.choice([500.0, 10000.0, 1e6]), {"max_position_embeddings": context}
    if rng.random() < 0.5:
        new = {"rope_type": kind, "rope_theta": theta}
        return found | {"rope_parameters": new | (scaling if kind != "default" else {})}, (
            kind == "dynamic"
        )
    spelling = {} if kind == "default" else {rng.choice(["type", "rope_type"]): kind, **scaling}
    return found | {"rope_theta": theta, "rope_scaling": spelling or None}, kind == "dynamic"


def write_golden(name: str, variant: dict, path: Path) -> None:
    """The checkpoint and the results of transformers, with clear choices everywhere."""
    for attempt in range(MAX_TRIES):
        drawn = variant | {"seed": variant["seed"] + 10 * attempt}
        make_goldens.write_checkpoint(drawn, path)
        found = make_goldens.record_lm(name, drawn, path)
        is_clear = found["min_margin"] > MIN_MARGIN and found["min_router_gap"] > MIN_ROUTER_GAP
        if is_clear:
            (path / "golden.json").write_text(json.dumps(found))
            return
    raise SystemExit(f"{name}: no clear choices in {MAX_TRIES} tries")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=6)
    args = parser.parse_args()
    make_goldens.torch.set_num_threads(1)
    for number in range(args.first, args.first + args.count):
        for family in FAMILIES:
            name = f"{family}-random-{number}"
            write_golden(name, make_variant(family, number), args.out / name)


if __name__ == "__main__":
    main()
