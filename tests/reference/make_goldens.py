"""Tiny random checkpoints of all families, with golden outputs.

    python -m tests.reference.make_goldens OUT                     # write every variant
    python -m tests.reference.make_goldens OUT --only olmoe dots1  # name prefixes
    python -m tests.reference.make_goldens OUT --verify            # check an existing folder again
    python -m tests.reference.make_goldens OUT --list

The expected outputs come from Hugging Face transformers (tested with 5.23.0) run on CPU, one prompt
at a time, in float64 (some variants also in bfloat16): float32 results depend on the matrix library
and on the processor. Those of qwen3next-base in float32 are off by 7e-5 in a router's logits with
MKL's kernels for AMD's processors, and by 1.8e-4 with those for Intel's with AVX-512. How far
transformers in float32 is off here is recorded too. Everything is a function of the constants here
and in ``variants``: weights are drawn tensor by tensor from numpy's frozen MT19937 stream, seeded
by (variant seed, tensor name), so they do not depend on the version of torch or of transformers.
The tensors of a golden are described in ``reference/goldens.py``.
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

from tests.reference.double import float32_as_float64
from tests.reference.variants import (
    dots1,
    ernie4_5_moe,
    flex_olmo,
    glm4_moe,
    gpt_oss,
    hybrid,
    jetmoe,
    latent,
    mixtral,
    olmoe,
    qwen3_moe,
)
from tests.reference.variants.tokens import BOS, EOS, PAD, VOCAB

transformers.utils.logging.disable_progress_bar()
V4 = int(transformers.__version__.split(".")[0]) < 5

NEW_TOKENS = 32
PROMPT_LENS = (1, 2, 7, 8, 16, 17, 40, 100)
FIRST_PLAIN_ID = 6  # prompts are drawn from [FIRST_PLAIN_ID, VOCAB)

VARIANTS: dict[str, dict] = {
    **olmoe.VARIANTS,
    **dots1.VARIANTS,
    **jetmoe.VARIANTS,
    **qwen3_moe.VARIANTS,
    **glm4_moe.VARIANTS,
    **mixtral.VARIANTS,
    **ernie4_5_moe.VARIANTS,
    **gpt_oss.VARIANTS,
    **flex_olmo.VARIANTS,
    **latent.VARIANTS,
    **hybrid.VARIANTS,
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
    if dtype == torch.float64:
        return in_float64(load_model(path, cfg), cfg)
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


def in_float64(model, cfg: dict):
    """The same model; its constants keep their values in float32. grouped_mm takes no float64."""
    if hasattr(model, "set_experts_implementation") and cfg["model_type"] != "jetmoe":
        model.set_experts_implementation("eager")
    return model.double()


# --------------------------------------------------------------------------------------
# Recording
# --------------------------------------------------------------------------------------


class RouterRecorder:
    """Collects, per routed layer, the chosen expert ids (ascending) and their weights.

    gap is the smallest distance between the worst chosen and the best refused selection
    score ever seen (and, with groups, between worst kept and best refused
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
        self.layers, self.logits = {}, {}

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


def save_golden(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Writes what was recorded; float64 is rounded to float32."""
    rounded = {k: v.float() if v.dtype == torch.float64 else v for k, v in tensors.items()}
    save_file({k: v.clone().contiguous() for k, v in rounded.items()}, path / "golden.safetensors")


def record_prompt(model, rec: RouterRecorder, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Results of one prompt by name; routers: prompt tokens, then the 31 fed-back tokens."""
    rec.reset()
    logits, hidden, toks, margins, logprobs = greedy(model, ids, NEW_TOKENS)
    return {
        "prompt_ids": ids,
        "logits": logits,
        "hidden_states": hidden,
        "greedy_ids": toks,
        "greedy_margin": margins,
        "greedy_logprob": logprobs,
        **rec.stacked(),
    }


def float32_errors(model, cfg: dict, exact: list[dict]) -> dict[str, torch.Tensor]:
    """The largest error of a model in float32 over all prompts, by name of a result."""
    rec, worst = RouterRecorder(model, cfg), {}
    for want in exact:
        for name, found in record_prompt(model, rec, want["prompt_ids"]).items():
            if found.is_floating_point():
                error = (found.double() - want[name].double()).abs().max()
                worst[name] = torch.maximum(error, worst.get(name, error))
    return {f"float32_error.{name}": error.float() for name, error in worst.items()}


def record_lm(name: str, variant: dict, path: Path) -> dict:
    cfg = variant["config"]
    model = load_model(path, cfg, torch.float64)
    rec = RouterRecorder(model, cfg)
    with float32_as_float64():
        exact = [record_prompt(model, rec, ids) for ids in prompts(variant["seed"])]
        batch = {} if variant.get("alone") else record_batch(model, variant)
    stats = {
        "min_margin": min(found["greedy_margin"].min().item() for found in exact),
        "min_router_gap": rec.gap,
        "distinct_tokens": len(
            {token for found in exact for token in found["greedy_ids"].tolist()}
        ),
        "logit_std": max(found["logits"].std().item() for found in exact),
    }
    tensors = batch | {
        f"p{i}.{key}": value for i, found in enumerate(exact) for key, value in found.items()
    }
    tensors |= float32_errors(load_model(path, cfg), cfg, exact)
    if variant.get("bf16"):
        half = load_model(path, cfg, torch.bfloat16)
        worst, median = 0.0, []
        for i, ids in enumerate(prompts(variant["seed"])):
            logits, hidden, *_ = greedy(half, ids, 1)
            tensors[f"p{i}.logits_bf16"] = logits
            tensors[f"p{i}.hidden_states_bf16"] = hidden
            diff = (logits - tensors[f"p{i}.logits"]).abs()
            worst = max(worst, diff.max().item())
            median.append(diff.flatten())
        stats |= {
            "bf16_max_abs_diff_to_fp32": worst,
            "bf16_median_abs_diff_to_fp32": torch.cat(median).median().item(),
        }
    save_golden(tensors, path)
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
    model = load_model(path, cfg, torch.float64)
    tensors, spread = {}, float("inf")
    for key, (ids, mask) in seqcls_inputs(
        variant["seed"], "pad_token_id" in variant["config"]
    ).items():
        with torch.no_grad(), float32_as_float64():
            out = model(input_ids=ids, attention_mask=mask).logits.float()
        tensors[f"{key}.input_ids"] = ids
        if mask is not None:
            tensors[f"{key}.attention_mask"] = mask
        tensors[f"{key}.logits"] = out
        spread = min(spread, margin(out).min().item())
    for i, ids in enumerate(prompts(variant["seed"])):
        with torch.no_grad(), float32_as_float64():
            out = model(input_ids=ids[None]).logits[0].float()
        tensors[f"p{i}.prompt_ids"], tensors[f"p{i}.logits"] = ids, out
    save_golden(tensors, path)
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
