"""Configs of all families: defaults, spellings, what is refused, what is reported."""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.local_engine import LocalEngine
from cluster.core.errors import CheckpointError
from tests.fakes import TINY_CONFIG, write_tiny_checkpoint
from workers.model.families.grouped.dots1 import Dots1Family
from workers.model.families.grouped.olmoe import OlmoeFamily
from workers.model.families.latent.family import LatentFamily
from workers.model.families.registry import load_family
from workers.model.families.routed.jetmoe import JetMoeFamily

pytestmark = pytest.mark.heavy

DOTS1: Mapping[str, Any] = {
    "model_type": "dots1",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "sliding_window": None,
}
JETMOE: Mapping[str, Any] = {"model_type": "jetmoe", "num_hidden_layers": 2}
QWEN3: Mapping[str, Any] = {"model_type": "qwen3_moe", "num_hidden_layers": 4, "head_dim": 16}
GLM4: Mapping[str, Any] = {"model_type": "glm4_moe", "num_hidden_layers": 4, "head_dim": 16}
MIXTRAL: Mapping[str, Any] = {"model_type": "mixtral", "num_hidden_layers": 2}
MINIMAX: Mapping[str, Any] = {"model_type": "minimax_m2", "num_hidden_layers": 2}
ERNIE: Mapping[str, Any] = {"model_type": "ernie4_5_moe", "num_hidden_layers": 4}
GPT_OSS: Mapping[str, Any] = {"model_type": "gpt_oss", "num_hidden_layers": 2}
FLEX_OLMO: Mapping[str, Any] = {"model_type": "flex_olmo", "num_hidden_layers": 2}
DEEPSEEK: Mapping[str, Any] = {"model_type": "deepseek_v3", "num_hidden_layers": 4}
DEEPSEEK2: Mapping[str, Any] = {
    "model_type": "deepseek_v2",
    "num_hidden_layers": 4,
    "num_experts_per_tok": 6,
}
FLASH: Mapping[str, Any] = {"model_type": "glm4_moe_lite", "num_hidden_layers": 4}
QWEN3_NEXT: Mapping[str, Any] = {"model_type": "qwen3_next", "num_hidden_layers": 4}
QWEN35_TEXT: Mapping[str, Any] = {"model_type": "qwen3_5_moe_text", "num_hidden_layers": 4}
QWEN35: Mapping[str, Any] = {"model_type": "qwen3_5_moe", "text_config": QWEN35_TEXT}
FAMILIES = {
    "olmoe": TINY_CONFIG,
    "dots1": DOTS1,
    "jetmoe": JETMOE,
    "qwen3_moe": QWEN3,
    "glm4_moe": GLM4,
    "mixtral": MIXTRAL,
    "minimax_m2": MINIMAX,
    "ernie4_5_moe": ERNIE,
    "gpt_oss": GPT_OSS,
    "flex_olmo": FLEX_OLMO,
    "deepseek_v2": DEEPSEEK2,
    "deepseek_v3": DEEPSEEK,
    "kimi_k2": {**DEEPSEEK, "model_type": "kimi_k2"},
    "glm4_moe_lite": FLASH,
    "qwen3_next": QWEN3_NEXT,
    "qwen3_5_moe_text": QWEN35_TEXT,
    "qwen3_5_moe": QWEN35,
}


def test_classes_defaults_of_an_empty_file() -> None:
    olmoe = load_family({"model_type": "olmoe"})
    assert isinstance(olmoe, OlmoeFamily)
    assert (olmoe.config.hidden_size, olmoe.config.num_layers) == (2048, 16)
    assert (olmoe.config.eos_token_ids, olmoe.config.pad_token_id) == ((50279,), 1)
    jetmoe = load_family({"model_type": "jetmoe", "num_attention_heads": 7})
    assert isinstance(jetmoe, JetMoeFamily)
    assert (jetmoe.config.num_heads, jetmoe.config.num_kv_heads) == (32, 16)
    assert (jetmoe.config.head_dim, jetmoe.config.tie_word_embeddings) == (128, True)
    with pytest.raises(CheckpointError, match="n_routed_experts is missing"):
        load_family({"model_type": "dots1"})


@pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
def test_what_a_file_leaves_out_is_as_in_transformers() -> None:
    """All defaults of a class written out mean the same as none of them."""
    dots1 = {"n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4}
    ahead = ("num_nextn_predict_layers",)  # they are not loaded
    reported = {"glm4_moe": ahead, "deepseek_v3": ahead}
    needed = {
        "dots1": dots1,
        "glm4_moe": {"head_dim": 128},  # half of 4096 / 96 is odd
        "deepseek_v2": {"num_experts_per_tok": 6},
    }
    code = (
        "import json, transformers as t\n"
        f"made = [t.OlmoeConfig(), t.Dots1Config(**{dots1}), t.JetMoeConfig(), "
        "t.Qwen3MoeConfig(), t.Glm4MoeConfig(head_dim=128), t.MixtralConfig(), "
        "t.MiniMaxM2Config(), t.Ernie4_5_MoeConfig(), t.Glm4MoeLiteConfig(), "
        "t.DeepseekV3Config(), t.DeepseekV2Config(num_experts_per_tok=6)]\n"
        "print(json.dumps([one.to_dict() for one in made]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=540
    )
    for full in json.loads(done.stdout):
        name = full["model_type"]
        short = {"model_type": name, **needed.get(name, {})}
        ours, theirs = load_family(short), load_family({**full, "architectures": None})
        rest = {
            name: getattr(theirs.config, name) for name in ("ignored_keys", "num_prediction_layers")
        }
        assert theirs.config == replace(ours.config, **rest)
        assert theirs.banks == ours.banks
        assert theirs.config.ignored_keys == reported.get(name, ())
        assert list(theirs.attention_tensors()) == list(ours.attention_tensors())


def test_end_tokens_outside_the_vocabulary_have_no_effect() -> None:
    sizes = {"model_type": "jetmoe", "vocab_size": 100}
    family = load_family({**sizes, "eos_token_id": [-1, 0, 99, 100, 5000]})
    assert family.config.eos_token_ids == (0, 99)


def test_null_is_absent_but_for_token_ids_and_the_window() -> None:
    config = {"rms_norm_eps": None, "eos_token_id": None, "tie_word_embeddings": None}
    family = load_family({"model_type": "jetmoe", **config})
    assert family.config.rms_norm_eps == 1e-6
    assert family.config.eos_token_ids == ()
    assert family.config.tie_word_embeddings
    dots1 = load_family(DOTS1)
    assert isinstance(dots1, Dots1Family)
    assert dots1.windows == frozenset()
    absent = {k: v for k, v in DOTS1.items() if k != "sliding_window"}
    dots1 = load_family({**absent, "max_window_layers": 3})
    assert isinstance(dots1, Dots1Family)
    assert dots1.dots1.windows == (None, None, None, 4096)


def test_null_flags_of_deepseek_are_false_as_in_transformers() -> None:
    null = load_family({**DEEPSEEK, "norm_topk_prob": None, "rope_interleave": None})
    assert isinstance(null, LatentFamily)
    assert not null.experts.norm_topk_prob
    assert not null.config.rope.has_neighbours
    absent = load_family(DEEPSEEK)
    assert isinstance(absent, LatentFamily)
    assert absent.experts.norm_topk_prob
    assert absent.config.rope.has_neighbours
    assert load_family({**DEEPSEEK2, "num_experts": 32}).banks[0].num_experts == 32


def test_both_spellings_mean_the_same() -> None:
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 5e5}}
    for config in FAMILIES.values():
        first = load_family({**config, **old, "torch_dtype": "bfloat16"}).config
        assert first == load_family({**config, **new, "dtype": "bfloat16"}).config
    assert load_family({**DOTS1, "n_routed_experts": None, "num_local_experts": 16})
    assert load_family({**JETMOE, "head_dim": 64}).config.head_dim == 64


def test_explicit_layer_types_win_over_max_window_layers() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    changes = {"sliding_window": 9, "max_window_layers": 0, "layer_types": kinds}
    dots1 = load_family({**DOTS1, **changes})
    assert isinstance(dots1, Dots1Family)
    assert dots1.dots1.windows == (9, None, 9, None)
    assert dots1.windows == {9}


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("olmoe", {"architectures": ["OlmoeModel"]}, "architectures .* is not supported"),
        ("olmoe", {"n_shared_experts": 1}, "n_shared_experts 1 is not supported for olmoe"),
        ("olmoe", {"tie_word_embeddings": 1}, "tie_word_embeddings 1 must be true or false"),
        ("olmoe", {"eos_token_id": "2"}, "eos_token_id '2' must be a token id"),
        ("olmoe", {"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("olmoe", {"rope_parameters": {"full_attention": {}}}, "full_attention"),
        ("dots1", {"hidden_act": "swish"}, "hidden_act 'swish' is not supported"),
        ("dots1", {"clip_qkv": 3.0}, "clip_qkv 3.0 is not supported for dots1"),
        ("dots1", {"n_group": 3}, "n_routed_experts 16 must be a multiple of n_group 3"),
        ("dots1", {"n_group": 16}, "at least 2 experts in a group"),
        ("dots1", {"n_group": 2, "topk_group": 3}, "topk_group 3 exceeds n_group 2"),
        ("dots1", {"n_group": 8, "topk_group": 1}, "num_experts_per_tok 4 exceeds the 2"),
        ("dots1", {"first_k_dense_replace": 4}, "leaves no layer with experts"),
        ("dots1", {"n_shared_experts": None}, "n_shared_experts is missing"),
        ("dots1", {"num_key_value_heads": 3}, "multiple of num_key_value_heads 3"),
        ("dots1", {"head_dim": 7}, "head_dim 7 must be even"),
        ("dots1", {"layer_types": ["full_attention"]}, "layer_types must list all 4 layers"),
        ("dots1", {"layer_types": ["chunked_attention"] * 4}, "'chunked_attention' is not"),
        ("dots1", {"layer_types": ["sliding_attention"] * 4}, "sliding_window is null"),
        ("qwen3_moe", {"num_experts_per_tok": 129}, "num_experts_per_tok 129 exceeds num_experts"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}, "leave no layer with experts"),
        ("qwen3_moe", {"decoder_sparse_step": 5}, "decoder_sparse_step 5 leave no layer"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step 0 must be a positive"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers 3 must be a list of layers"),
        ("qwen3_moe", {"n_shared_experts": 1}, "n_shared_experts 1 is not supported for qwen3_moe"),
        ("qwen3_moe", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not"),
        ("qwen3_moe", {"quantization_config": {"quant_method": "hqq"}}, "quant_method 'hqq'"),
        ("qwen3_moe", {"quantization_config": {"quant_method": "fp8"}}, "weight_block_size None"),
        ("qwen3_moe", {"quantization_config": {"quant_method": "fp8", "bits": 4}}, "bits 4 is not"),
        (
            "qwen3_moe",
            {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}},
            "fmt 'e5m2' is",
        ),
        ("qwen3_moe", {"quantization_config": {}}, "quant_method is missing"),
        (
            "qwen3_moe",
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 0]}},
            r"weight_block_size \[128, 0\] must be two positive sizes",
        ),
        ("glm4_moe", {"n_group": 3}, "n_routed_experts 128 must be a multiple of n_group 3"),
        ("glm4_moe", {"first_k_dense_replace": 4}, "leaves no layer with experts"),
        (
            "glm4_moe",
            {"partial_rotary_factor": 0.2},
            "partial_rotary_factor 0.2 must leave an even",
        ),
        ("glm4_moe", {"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5 must leave"),
        ("glm4_moe", {"rope_parameters": {"partial_rotary_factor": "half"}}, "'half' must leave"),
        ("glm4_moe", {"sliding_window": 8}, "sliding_window 8 is not supported for glm4_moe"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds num_local_experts"),
        ("mixtral", {"attention_bias": True}, "attention_bias True is not supported for mixtral"),
        ("mixtral", {"sliding_window": 0}, "sliding_window 0 must be a positive integer"),
        ("minimax_m2", {"attn_type_list": [1, 0]}, "attn_type_list .1, 0. of minimax_m2 must be 1"),
        ("minimax_m2", {"rotary_dim": 192}, "must leave an even number of the 128 elements"),
        ("minimax_m2", {"shared_intermediate_size": 8}, "shared_intermediate_size 8 is not"),
        ("minimax_m2", {"use_qk_norm": False}, "use_qk_norm False is not supported"),
        ("mixtral", {"rotary_dim": 64}, "rotary_dim 64 is not supported for mixtral"),
        ("ernie4_5_moe", {"moe_k": 65}, "moe_k 65 exceeds moe_num_experts 64"),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias True is not supported for ernie4_5_moe"),
        ("ernie4_5_moe", {"moe_layer_start_index": 4}, "leave no layer with experts"),
        ("ernie4_5_moe", {"moe_num_experts": [64, 64]}, "moe_num_experts .* positive integer"),
        ("flex_olmo", {"num_experts_per_tok": 8}, "num_experts_per_tok 8 exceeds num_experts 7"),
        ("flex_olmo", {"clip_qkv": 3.0}, "clip_qkv 3.0 is not supported for flex_olmo"),
        ("qwen3_next", {"num_experts_per_tok": 513}, "513 exceeds num_experts 512"),
        ("qwen3_next", {"num_experts": 0}, "num_experts 0 must be a positive integer"),
        ("qwen3_next", {"layer_types": ["full_attention"]}, "layer_types .* must name 4 layers"),
        ("qwen3_next", {"layer_types": ["chunked_attention"] * 4}, "each linear_attention or"),
        ("qwen3_next", {"layer_types": ["linear_attention"] * 4}, "no layer with full_attention"),
        ("qwen3_next", {"full_attention_interval": 5}, "no layer with full_attention"),
        ("qwen3_next", {"full_attention_interval": 0}, "full_attention_interval 0 must be a pos"),
        ("qwen3_next", {"linear_num_key_heads": 5}, "linear_num_value_heads 32 must be a multiple"),
        ("qwen3_next", {"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim 0 must be a posit"),
        ("qwen3_next", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported for qwen3_next"),
        ("qwen3_next", {"mlp_only_layers": [0, 1, 2, 3]}, "leave no layer with experts"),
        ("qwen3_next", {"sliding_window": 8}, "sliding_window 8 is not supported for qwen3_next"),
        ("qwen3_next", {"n_shared_experts": 1}, "n_shared_experts 1 is not supported"),
        ("qwen3_5_moe_text", {"attn_output_gate": False}, "attn_output_gate False is not"),
        ("qwen3_5_moe_text", {"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype 'bfloat16' is not"),
        ("qwen3_5_moe_text", {"mlp_only_layers": [1]}, r"mlp_only_layers \[1\] is not supported"),
        ("qwen3_5_moe_text", {"decoder_sparse_step": 2}, "decoder_sparse_step 2 is not supported"),
        ("qwen3_5_moe", {"text_config": None}, "text_config None must be an object"),
        (
            "qwen3_5_moe",
            {"architectures": ["Qwen3_5MoeForCausalLM"]},
            "is not supported: it is not",
        ),
        (
            "qwen3_5_moe",
            {"text_config": {**QWEN35_TEXT, "tie_word_embeddings": True}},
            "tie_word_embeddings of text_config is true",
        ),
        ("gpt_oss", {"num_experts_per_tok": 129}, "129 exceeds num_local_experts 128"),
        ("gpt_oss", {"layer_types": ["full_attention"]}, "for each of the 2 layers"),
        ("gpt_oss", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ("gpt_oss", {"swiglu_limit": 0}, "swiglu_limit 0 must be a positive number"),
        ("gpt_oss", {"swiglu_alpha": True}, "swiglu_alpha True must be a positive number"),
        ("gpt_oss", {"quantization_config": {"quant_method": "fp8"}}, "must be 'mxfp4'"),
        ("gpt_oss", {"quantization_config": 4}, "quantization_config 4 must be an object"),
        (
            "gpt_oss",
            {"quantization_config": {"quant_method": "mxfp4", "bits": 4}},
            "bits 4 is not supported",
        ),
        ("deepseek_v3", {"n_group": 3}, "n_routed_experts 256 must be a multiple of n_group 3"),
        (
            "deepseek_v3",
            {"scoring_func": "softmax"},
            "scoring_func 'softmax' .*: must be 'sigmoid'",
        ),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method 'greedy' .* 'noaux_tc'"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq 2 is not supported"),
        ("deepseek_v3", {"num_key_value_heads": 8}, "must be num_attention_heads 128"),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim 7 must be even"),
        (
            "deepseek_v3",
            {"rope_scaling": {"mscale_all_dim": "x", "type": "linear"}},
            "must be numbers",
        ),
        ("deepseek_v3", {"head_dim": 128}, "head_dim 128 is not supported: must be 64"),
        ("deepseek_v3", {"qk_head_dim": 128}, "qk_head_dim 128 is not supported: must be 192"),
        ("kimi_k2", {"first_k_dense_replace": 4}, "leaves no layer with experts"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob True is not supported"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "'greedy' or 'group_limited_greedy'"),
        ("deepseek_v2", {"num_experts_per_tok": None}, "num_experts_per_tok is missing"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"] * 4}, "leaves no layer with experts"),
        ("glm4_moe_lite", {"mlp_layer_types": ["sparse"]}, "for each of the 4 layers"),
        ("glm4_moe_lite", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not"),
        ("olmoe", {"kv_lora_rank": 512}, "kv_lora_rank 512 is not supported for olmoe"),
        ("jetmoe", {"activation_function": "gelu_new"}, "activation_function 'gelu_new'"),
        ("jetmoe", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 exceeds num_local_experts"),
        ("jetmoe", {"attention_bias": True}, "attention_bias True is not supported for jetmoe"),
        ("jetmoe", {"rope_scaling": {"rope_type": "longrope"}}, "rope type 'longrope'"),
        ("minimax_m2", {"attn_type_list": 0.5}, "attn_type_list 0.5 of minimax_m2 must be 1"),
        ("olmoe", {"layer_types": 7}, "layer_types 7 of olmoe must all be full_attention"),
        ("olmoe", {"rms_norm_eps": 10**400}, "rms_norm_eps 10+ must be a positive number"),
        ("deepseek_v3", {"qk_nope_head_dim": 10**400}, "qk_nope_head_dim 10+ must be at most"),
        ("jetmoe", {"max_position_embeddings": 10**400}, "max_position_embeddings 10+ must be"),
    ],
)
def test_what_would_change_the_result_is_refused(
    name: str, changes: dict[str, Any], words: str
) -> None:
    load_family(FAMILIES[name])
    with pytest.raises(CheckpointError, match=words):
        load_family({**FAMILIES[name], **changes})


def test_keys_of_public_checkpoints_are_known() -> None:
    official = {
        "moe_layer_freq": 1,
        "pretraining_tp": 1,
        "scoring_func": "noaux_tc",
        "topk_method": "noaux_tc",
        "use_sliding_window": False,
        "transformers_version": "4.51.0",
        "use_cache": True,
    }
    assert load_family({**DOTS1, **official}).config.ignored_keys == ()


def test_labels_of_a_classifier() -> None:
    head = {"architectures": ["JetMoeForSequenceClassification"]}
    assert load_family({**JETMOE, **head}).config.labels == ("LABEL_0", "LABEL_1")
    names = {"id2label": {"1": "good", "0": "bad"}, "num_labels": 7, "problem_type": "regression"}
    config = load_family({**JETMOE, **head, **names}).config
    assert (config.labels, config.problem_type) == (("bad", "good"), "regression")
    assert load_family({**JETMOE, **names}).config.labels == ()
    with pytest.raises(CheckpointError, match="must name the classes 0, 1"):
        load_family({**JETMOE, **head, "id2label": {"1": "good"}})


def test_unknown_keys_are_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_tiny_checkpoint(tmp_path)
    config = {**TINY_CONFIG, "colour": "red", "attention_dropout": 0.1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_family(config).config.ignored_keys == ("colour",)
    with caplog.at_level(logging.WARNING):
        LocalEngine(tmp_path)
    assert [r.getMessage() for r in caplog.records] == ["config.json: ignored, not known: colour"]


def test_a_text_model_inside_of_another_has_its_keys_and_those_beside_it() -> None:
    text = {**QWEN35_TEXT, "num_experts": 32, "dtype": None, "eos_token_id": 7}
    outer = {**QWEN35, "text_config": text, "tie_word_embeddings": True, "dtype": "bfloat16"}
    family = load_family({**outer, "eos_token_id": 8, "vision_config": {"depth": 2}})
    config = family.config
    assert (config.dtype, config.eos_token_ids) == ("bfloat16", (7,))
    assert config.tie_word_embeddings
    assert config.ignored_keys == ("vision_config",)
    assert {bank.num_experts for bank in family.banks} == {32}
    names = {part.name for part in family.attention_tensors()}
    assert "model.language_model.layers.3.self_attn.q_proj.weight" in names
    assert all(name.startswith("model.language_model.") for name in names)


def test_layers_with_a_recurrent_state() -> None:
    config = load_family({**QWEN3_NEXT, "num_hidden_layers": 8}).config
    assert config.kv_layers == (3, 7)
    assert config.kv_vectors_per_token == 2 * 2 * 2
    assert config.delta_net is not None
    assert config.delta_net.layers == (0, 1, 2, 4, 5, 6)
    assert config.state_bytes == 6 * 4 * (3 * 8192 + 32 * 128 * 128)
    attention = load_family({**QWEN3_NEXT, "layer_types": ["full_attention"] * 4}).config
    assert (attention.delta_net, attention.state_bytes) == (None, 0)
