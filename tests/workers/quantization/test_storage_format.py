"""What ``quantization_config`` says of stored matrices, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.core.errors import CheckpointError
from tests.workers.quantization.configs import AUTO_ROUND, GPTQ, SETTINGS, group, tensors_config
from workers.quantization.formats import WeightFormat
from workers.quantization.storage_format import StorageFormat, parse_storage_format

FP8 = {"quant_method": "fp8", "weight_block_size": [64, 128]}
TUNING = {
    "amp": True,
    "act_bits": 16,
    "act_data_type": "float",
    "act_dynamic": True,
    "act_group_size": 8,
    "act_sym": True,
    "autoround_version": "0.9.0",
    "batch_size": 8,
    "data_type": "int",
    "enable_minmax_tuning": True,
    "enable_quanted_input": True,
    "gradient_accumulate_steps": 1,
    "iters": 200,
    "lr": 0.005,
    "nsamples": 128,
    "scale_dtype": "torch.float16",
    "seqlen": 2048,
    "static_attention_granularity": "tensor",
    "static_kv_dtype": None,
    "static_kv_granularity": "tensor",
    "super_bits": None,
}
"""What AutoRound writes beside the numbers."""
META = {"quantizer": ["gptqmodel:6.0.0"], "act_group_aware": True, "mse": 0.0}


def integers(bits: int, group: int | None, has_zeros: bool) -> WeightFormat:
    return WeightFormat(codes="int4" if bits == 4 else "int8", group=group, has_zeros=has_zeros)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("int4", "quantization_config 'int4' must be an object"),
        ({"bits": 4}, "quant_method is missing"),
        ({"quant_method": ["gptq"]}, "quant_method ['gptq'] is not supported: must be 'fp8'"),
        ({"quant_method": {}}, "quant_method {} is not supported: must be 'fp8'"),
        ({"quant_method": "hqq"}, "quant_method 'hqq' is not supported: must be 'fp8' or 'gptq'"),
        ({**GPTQ, "bits": 3}, "bits 3 is not supported: must be 4 or 8"),
        ({**GPTQ, "group_size": 12}, "group_size 12 must be -1 or a multiple of 8"),
        ({**GPTQ, "group_size": None}, "group_size None must be"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin' is not supported"),
        ({**GPTQ, "checkpoint_format": "gptq_p"}, "checkpoint_format 'gptq_p' is not supported"),
        ({**GPTQ, "format": "marlin"}, "format 'marlin' is not supported: must be 'gptq' or"),
        ({**GPTQ, "is_marlin_format": True}, "is_marlin_format True is not supported"),
        (
            {**GPTQ, "format": "gptq_v2", "checkpoint_format": "gptq"},
            "format 'gptq_v2' is not supported: must be 'gptq', as checkpoint_format is",
        ),
        ({**GPTQ, "method": "qqq"}, "method 'qqq' is not supported"),
        ({**GPTQ, "pack_dtype": "int16"}, "pack_dtype 'int16' is not supported"),
        ({**GPTQ, "rotation": "hadamard"}, "rotation 'hadamard' is not supported"),
        ({**GPTQ, "adapter": {"name": "lora"}}, "adapter {'name': 'lora'} is not supported"),
        ({**GPTQ, "rotation_configs": [{"kind": "x"}]}, "rotation_configs [{'kind': 'x'}] is not"),
        ({**GPTQ, "quarot": True}, "quarot True is not supported"),
        ({**GPTQ, "svd_rank": 32}, "svd_rank 32 is not supported"),
        ({**GPTQ, "packing": "x"}, "packing 'x' is not supported"),
        ({**GPTQ, "layer_config": {"a": {"bits": 8}}}, "layer_config 'a': bits 8 is not supported"),
        ({**FP8, "scale_fmt": "e5m2"}, "scale_fmt 'e5m2' is not supported: must be 'float' or"),
        ({**GPTQ, "act_bits": 8}, "act_bits 8 is not supported"),
        ({**GPTQ, "data_type": "nv_fp"}, "data_type 'nv_fp' is not supported: must be 'int'"),
        ({**GPTQ, "super_bits": 6}, "super_bits 6 is not supported"),
        ({**GPTQ, "static_kv_dtype": "fp8"}, "static_kv_dtype 'fp8' is not supported"),
        ({**GPTQ, "static_attention_dtype": "fp8"}, "static_attention_dtype 'fp8' is not"),
        ({**GPTQ, "dynamic": {"+:.*down.*": {"bits": 8}}}, "dynamic '+:.*down.*': bits 8 is not"),
        ({**GPTQ, "dynamic": {".*down.*": {"group_size": 64}}}, "'.*down.*': group_size 64 is not"),
        ({**GPTQ, "dynamic": ["-:.*"]}, "dynamic ['-:.*'] is not supported: must be an object"),
        (
            {**AUTO_ROUND, "packing_format": "auto_round:fp8_static"},
            "packing_format 'auto_round:fp8",
        ),
        (
            {**AUTO_ROUND, "extra_config": {"lm_head": {"bits": 8}}},
            "extra_config 'lm_head': bits 8",
        ),
        ({**AUTO_ROUND, "packing_format": "auto_round:awq", "bits": 8}, "bits 8 is not supported"),
        ({**SETTINGS["awq"], "backend": "llm-awq"}, "backend 'llm-awq' is not supported"),
        ({**SETTINGS["awq"], "format": "gemv_fast"}, "format 'gemv_fast' is not supported"),
        ({**SETTINGS["awq"], "version": "marlin"}, "version 'marlin' is not supported"),
        (
            {**tensors_config(), "kv_cache_scheme": {"num_bits": 8}},
            "kv_cache_scheme {'num_bits': 8}",
        ),
        (
            {**tensors_config(), "sparsity_config": {"format": "sparse-24-bitmask"}},
            "sparsity_config {'format': 'sparse-24-bitmask'} is not supported",
        ),
        (
            {
                **tensors_config(),
                "transform_config": {"config_groups": {"u": {"type": "hadamard"}}},
            },
            "transform_config {'config_groups'",
        ),
        (
            {**tensors_config(), "attention_input_activations": {"num_bits": 8}},
            "attention_input_act",
        ),
        ({**tensors_config(), "quantization_status": "calibration"}, "quantization_status 'calib"),
        (tensors_config(strategy=None, group_size=None), "group_size None must be"),
        ({**SETTINGS["awq"], "version": "gemv"}, "version 'gemv' is not supported"),
        ({**SETTINGS["awq"], "bits": 8}, "bits 8 is not supported: must be 4"),
        ({**SETTINGS["awq"], "zero_point": 0.5}, "zero_point 0.5 is not supported"),
        (tensors_config(num_bits=3), "num_bits 3 is not supported: must be 4 or 8"),
        (tensors_config(symmetric="no"), "symmetric 'no' is not supported: must be True or False"),
        (tensors_config(actorder="group"), "actorder 'group' is not supported"),
        (tensors_config(type="float"), "type 'float' is not supported: must be 'int'"),
        ({**tensors_config(), "format": "int-quantized"}, "format 'int-quantized' is not"),
        ({**tensors_config(), "config_groups": {}}, "config_groups {} must be an object"),
        ({**tensors_config(), "config_groups": {"a": {}}}, "config_groups.a: weights None must"),
        (
            {**tensors_config(), "config_groups": {"a": group(), "b": group(num_bits=8)}},
            "config_groups a, b must have equal weights",
        ),
        (
            {**tensors_config(), "config_groups": {"a": {**group(), "input_activations": {}}}},
            "input_activations {} is not supported: must be None",
        ),
    ],
)
def test_what_would_change_the_numbers_is_refused(settings: Any, words: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        parse_storage_format(settings)
    assert words in str(refused.value)


EXPECTED = {
    "gptq": StorageFormat(method="gptq", form=integers(4, 8, True), zero_offset=1),
    "gptq-symmetric": StorageFormat(method="gptq", form=integers(4, 8, False), zero_offset=1),
    "gptq-8-bits-rows": StorageFormat(method="gptq", form=integers(8, None, True), zero_offset=1),
    "gptq-short-group": StorageFormat(method="gptq", form=integers(4, 24, True), zero_offset=1),
    "gptq-v2": StorageFormat(method="gptq", form=integers(4, 8, True)),
    "awq": StorageFormat(method="awq", form=integers(4, 8, True)),
    "awq-symmetric": StorageFormat(method="awq", form=integers(4, 8, False)),
    "auto-round": StorageFormat(method="gptq", form=integers(4, 8, True), zero_offset=1),
    "auto-round-v2": StorageFormat(method="gptq", form=integers(8, 8, True)),
    "auto-round-awq": StorageFormat(method="awq", form=integers(4, 8, True)),
    "awq-short-group": StorageFormat(method="awq", form=integers(4, 40, True)),
    "tensors": StorageFormat(method="compressed-tensors", form=integers(4, 8, False)),
    "tensors-short-group": StorageFormat(method="compressed-tensors", form=integers(8, 40, False)),
    "tensors-zeros-short-group": StorageFormat(
        method="compressed-tensors", form=integers(4, 24, True)
    ),
    "tensors-zeros": StorageFormat(method="compressed-tensors", form=integers(4, 8, True)),
    "tensors-8-bits-rows": StorageFormat(
        method="compressed-tensors", form=integers(8, None, False)
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_tools_write_is_read(name: str) -> None:
    assert parse_storage_format(SETTINGS[name]) == EXPECTED[name]


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        pytest.param(GPTQ, more, id=label)
        for label, more in (
            (
                "transformers-4",
                {
                    "tokenizer": None,
                    "dataset": "c4",
                    "damp_percent": 0.1,
                    "batch_size": 1,
                    "true_sequential": True,
                    "use_exllama": True,
                    "pad_token_id": None,
                    "exllama_config": {"version": 2},
                    "max_input_length": None,
                },
            ),
            (
                "transformers-5",
                {
                    "format": "gptq",
                    "checkpoint_format": "gptq",
                    "backend": "auto",
                    "act_group_aware": True,
                    "pad_token_id": 0,
                    "cache_block_outputs": True,
                    "meta": {"quantizer": ["optimum:2.0", "gptqmodel:6.0"]},
                },
            ),
            (
                "gptqmodel",
                {
                    "method": "gptq",
                    "format": "gptq",
                    "checkpoint_format": "gptq",
                    "pack_dtype": "int32",
                    "lm_head": False,
                    "meta": META,
                    "rotation": None,
                    "dynamic": {"-:.*mlp\\.gate$": {}, "+:.*q_proj": {"damp_percent": 0.05}},
                },
            ),
            ("auto-round", {**TUNING, "provider": "auto-round", "lm_head": True}),
            ("auto-round-left-out", {"dynamic": {"-:.*down_proj.*": {}, ".*up.*": {"bits": 16}}}),
            (
                "gptqmodel-4",
                {
                    "parallel_packing": True,
                    "v2": True,
                    "vram_strategy": "exclusive",
                    "fallback": {"strategy": "rtn", "threshold": "0.5%"},
                },
            ),
            ("auto-gptq", {"static_groups": False, "model_file_base_name": "model", "mse": 1.5}),
        )
    ]
    + [
        pytest.param(SETTINGS["awq"], more, id=label)
        for label, more in (
            ("awq-autoawq", {"modules_to_not_convert": ["gate"], "zero_point": True}),
            (
                "awq-transformers-5",
                {
                    "format": "gemm",
                    "version": "gemm",
                    "sym": True,
                    "desc_act": False,
                    "backend": "auto",
                    "damp_percent": 0.1,
                    "true_sequential": True,
                },
            ),
            (
                "awq-gptqmodel",
                {
                    "checkpoint_format": "gemm",
                    "format": "gemm",
                    "method": "awq",
                    "pack_dtype": "int32",
                    "meta": META,
                    "lm_head": False,
                },
            ),
            ("awq-auto-round", {**TUNING, "provider": "auto-round", "sym": False}),
        )
    ]
    + [
        pytest.param(tensors_config(), more, id=label)
        for label, more in (
            (
                "llm-compressor",
                {
                    "kv_cache_scheme": None,
                    "sparsity_config": {},
                    "transform_config": {},
                    "global_compression_ratio": None,
                    "version": "0.12.2",
                },
            ),
            (
                "llm-compressor-older",
                {
                    "quantization_status": "frozen",
                    "global_compression_ratio": 1.56,
                    "sparsity_config": {
                        "format": "dense",
                        "global_sparsity": 0.14,
                        "ignore": [],
                        "registry_requires_subclass": False,
                        "targets": [],
                    },
                },
            ),
            ("llm-compressor-auto-round", {"provider": "auto-round", "format": "mixed-precision"}),
        )
    ],
)
def test_keys_that_change_no_number_are_ignored(
    settings: dict[str, Any], more: dict[str, Any]
) -> None:
    stored = parse_storage_format({**settings, **more})
    assert stored == parse_storage_format(settings)
    assert stored is not None
    assert set(stored.ignored) <= set(more)
    for key in ("provider", "damp_percent", "iters"):
        assert (key in stored.ignored) == (key in more), "each ignored key is reported"


@pytest.mark.parametrize(
    ("more", "method", "zero_offset"),
    [
        ({}, "gptq", 1),
        ({**TUNING, "packing_format": "auto_round:auto_gptq"}, "gptq", 1),
        ({"packing_format": "auto_round:gptqmodel"}, "gptq", 0),
        ({"packing_format": "auto_round"}, "gptq", 0),
        ({"packing_format": "auto_round:auto_awq"}, "awq", 0),
        ({"extra_config": {"model.layers.0.mlp.gate": {"bits": 16, "data_type": "fp"}}}, "gptq", 1),
    ],
)
def test_layouts_of_auto_round(more: dict[str, Any], method: Any, zero_offset: int) -> None:
    expected = StorageFormat(method=method, form=integers(4, 8, True), zero_offset=zero_offset)
    assert parse_storage_format({**AUTO_ROUND, **more}) == expected


def test_a_strategy_that_is_left_out_follows_from_the_group_size() -> None:
    for group_size, strategy in ((8, "group"), (-1, "channel")):
        left_out = tensors_config(strategy=None, group_size=group_size)
        assert parse_storage_format(left_out) == parse_storage_format(
            tensors_config(strategy=strategy, group_size=group_size)
        )


def test_symmetric_awq_has_zero_points_that_are_all_alike() -> None:
    stored = parse_storage_format({**SETTINGS["awq"], "zero_point": False})
    assert stored == StorageFormat(method="awq", form=integers(4, 8, False))


def test_nothing_is_stored_otherwise_without_a_word() -> None:
    assert parse_storage_format(None) is None
    assert StorageFormat(method="awq", form=integers(4, 8, True)).block_rows == 1


def test_blocks_of_float8() -> None:
    stored = parse_storage_format({**FP8, "fmt": "e4m3", "modules_to_not_convert": ["lm_head"]})
    assert stored is not None
    assert stored == parse_storage_format(
        {**FP8, "activation_scheme": "dynamic", "scale_fmt": "ue8m0"}
    )
    assert stored.block == (64, 128)
    assert stored.form == WeightFormat(codes="e4m3", group=128)


def test_a_later_format_of_gptq_stores_zero_points_as_they_are() -> None:
    stored = parse_storage_format({**GPTQ, "checkpoint_format": "gptq_v2"})
    assert stored is not None
    assert stored.zero_offset == 0


def test_older_names_of_awq() -> None:
    older = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64}
    assert parse_storage_format(older) == StorageFormat(method="awq", form=integers(4, 64, True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "fp8"}, "weight_block_size None must be two positive sizes"),
        (
            {"quant_method": "fp8", "weight_block_size": [2**45, 128]},
            "must be two positive sizes of at most 65536",
        ),
        ({**GPTQ, "group_size": 2**45}, "must be -1 or a multiple of 8, at most 65536"),
        ({**FP8, "weight_block_size": [128]}, "weight_block_size [128] must be"),
        ({**FP8, "weight_block_size": [128, 0]}, "weight_block_size [128, 0] must be"),
        ({**FP8, "weight_block_size": [0, 128]}, "weight_block_size [0, 128] must be"),
        ({**FP8, "weight_block_size": [True, 128]}, "weight_block_size [True, 128] must be"),
        ({**FP8, "fmt": "e5m2"}, "fmt 'e5m2' is not supported: must be 'e4m3' or"),
        ({**FP8, "bits": 4}, "bits 4 is not supported"),
        ({**GPTQ, "bits": None}, "bits None is not supported"),
        ({**GPTQ, "group_size": 0}, "group_size 0 must be"),
        ({**GPTQ, "group_size": -2}, "group_size -2 must be"),
        ({**GPTQ, "group_size": True}, "group_size True must be"),
        ({"quant_method": "awq", "group_size": 8}, "bits is missing"),
        ({"quant_method": "compressed-tensors"}, "format is missing"),
        ({**tensors_config(), "config_groups": []}, "config_groups [] must be an object"),
        ({**tensors_config(), "config_groups": {"a": 3}}, "config_groups.a: weights None must"),
        (tensors_config(strategy="tensor"), "strategy 'tensor' is not supported"),
        (tensors_config(scale_format="x"), "scale_format 'x' is not supported"),
    ],
    ids=str,
)
def test_values_at_the_limits_are_refused(settings: Any, words: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        parse_storage_format(settings)
    assert words in str(refused.value)


def test_a_block_may_be_a_single_row() -> None:
    stored = parse_storage_format({**FP8, "weight_block_size": [1, 1]})
    assert stored is not None
    assert stored.block == (1, 1)


def test_what_nothing_is_assumed_of_must_be_there() -> None:
    settings = tensors_config()
    del settings["config_groups"]["group_0"]["weights"]["symmetric"]
    with pytest.raises(CheckpointError, match="symmetric is missing"):
        parse_storage_format(settings)
