"""What ``quantization_config`` says of stored matrices, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.core.errors import CheckpointError
from tests.workers.quantization.configs import GPTQ, SETTINGS, group, tensors_config
from workers.quantization.formats import WeightFormat
from workers.quantization.stored import StoredAs, stored_as

FP8 = {"quant_method": "fp8", "weight_block_size": [64, 128]}


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
        ({**GPTQ, "rotation": "hadamard"}, "rotation 'hadamard' is not supported"),
        ({**SETTINGS["awq"], "version": "gemv"}, "version 'gemv' is not supported"),
        ({**SETTINGS["awq"], "bits": 8}, "bits 8 is not supported: must be 4"),
        ({**SETTINGS["awq"], "zero_point": False}, "zero_point False is not supported"),
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
        stored_as(settings)
    assert words in str(refused.value)


EXPECTED = {
    "gptq": StoredAs(method="gptq", form=integers(4, 8, True), zero_offset=1),
    "gptq-symmetric": StoredAs(method="gptq", form=integers(4, 8, False), zero_offset=1),
    "gptq-8-bits-rows": StoredAs(method="gptq", form=integers(8, None, True), zero_offset=1),
    "gptq-short-group": StoredAs(method="gptq", form=integers(4, 24, True), zero_offset=1),
    "awq": StoredAs(method="awq", form=integers(4, 8, True)),
    "awq-short-group": StoredAs(method="awq", form=integers(4, 40, True)),
    "tensors": StoredAs(method="compressed-tensors", form=integers(4, 8, False)),
    "tensors-short-group": StoredAs(method="compressed-tensors", form=integers(8, 40, False)),
    "tensors-zeros-short-group": StoredAs(method="compressed-tensors", form=integers(4, 24, True)),
    "tensors-zeros": StoredAs(method="compressed-tensors", form=integers(4, 8, True)),
    "tensors-8-bits-rows": StoredAs(method="compressed-tensors", form=integers(8, None, False)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_tools_write_is_read(name: str) -> None:
    assert stored_as(SETTINGS[name]) == EXPECTED[name]


def test_nothing_is_stored_otherwise_without_a_word() -> None:
    assert stored_as(None) is None
    assert StoredAs(method="awq", form=integers(4, 8, True)).block_rows == 1


def test_blocks_of_float8() -> None:
    stored = stored_as({**FP8, "fmt": "e4m3", "modules_to_not_convert": ["lm_head"]})
    assert stored is not None
    assert stored.block == (64, 128)
    assert stored.form == WeightFormat(codes="e4m3", group=128)


def test_a_later_format_of_gptq_stores_zero_points_as_they_are() -> None:
    stored = stored_as({**GPTQ, "checkpoint_format": "gptq_v2"})
    assert stored is not None
    assert stored.zero_offset == 0


def test_older_names_of_awq() -> None:
    older = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64}
    assert stored_as(older) == StoredAs(method="awq", form=integers(4, 64, True))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "fp8"}, "weight_block_size None must be two positive sizes"),
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
        ({"quant_method": "awq", "group_size": 8}, "bits None is not supported"),
        ({"quant_method": "compressed-tensors"}, "format is missing"),
        ({**tensors_config(), "config_groups": []}, "config_groups [] must be an object"),
        ({**tensors_config(), "config_groups": {"a": 3}}, "config_groups.a: weights None must"),
        (tensors_config(strategy="tensor"), "strategy 'tensor' is not supported"),
        (tensors_config(observer_name="x"), "observer_name 'x' is not supported"),
    ],
    ids=str,
)
def test_values_at_the_limits_are_refused(settings: Any, words: str) -> None:
    with pytest.raises(CheckpointError) as refused:
        stored_as(settings)
    assert words in str(refused.value)


def test_a_block_may_be_a_single_row() -> None:
    stored = stored_as({**FP8, "weight_block_size": [1, 1]})
    assert stored is not None
    assert stored.block == (1, 1)


def test_what_nothing_is_assumed_of_must_be_there() -> None:
    settings = tensors_config()
    del settings["config_groups"]["group_0"]["weights"]["symmetric"]
    with pytest.raises(CheckpointError, match="symmetric is missing"):
        stored_as(settings)
