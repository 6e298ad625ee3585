"""Checkpoints of GPTQ, AWQ and compressed-tensors: as stored, as read, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.core.errors import CheckpointError
from tests.reference.goldens import golden_path
from tests.reference.local_engine import LocalEngine
from tests.workers.model.loading.packers import pack_checkpoint
from workers.experts.sources import CheckpointSource
from workers.model.config import TensorPart
from workers.model.loading.checkpoint import Checkpoint, check_checkpoint
from workers.quantization.matrix import QuantizedMatrix
from workers.quantization.stored import stored_as
from workers.requests.request import Request, SamplingParams

EXPERT = "model.layers.0.mlp.experts.3"


def group(**weights: Any) -> dict[str, Any]:
    """A group of compressed-tensors."""
    known = {"type": "int", "symmetric": True, "strategy": "group", "group_size": 8}
    return {"targets": ["Linear"], "weights": {**known, "num_bits": 4, **weights}}


def tensors_config(**weights: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group(**weights)},
        "ignore": ["lm_head", "re:.*mlp.gate$"],
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": False, "desc_act": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq": GPTQ,
    "gptq-symmetric": {**GPTQ, "sym": True},
    "gptq-8-bits-rows": {**GPTQ, "bits": 8, "group_size": -1, "checkpoint_format": "gptq"},
    "gptq-short-group": {**GPTQ, "group_size": 24, "checkpoint_format": "gptq"},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"},
    "awq-short-group": {"quant_method": "awq", "bits": 4, "group_size": 40, "zero_point": True},
    "tensors": tensors_config(),
    "tensors-short-group": tensors_config(num_bits=8, group_size=40),
    "tensors-zeros-short-group": tensors_config(symmetric=False, group_size=24),
    "tensors-zeros": tensors_config(symmetric=False),
    "tensors-8-bits-rows": tensors_config(num_bits=8, strategy="channel", group_size=None),
}


@pytest.fixture(params=SETTINGS)
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SETTINGS[request.param]


def packed(tmp_path: Path, settings: dict[str, Any]) -> tuple[Path, dict[str, QuantizedMatrix]]:
    path = Path(shutil.copytree(golden_path("olmoe-norm-gqa-clip"), tmp_path / "packed"))
    return path, pack_checkpoint(path, settings)


def test_matrices_are_read_as_what_their_codes_stand_for(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    path, matrices = packed(tmp_path, settings)
    checkpoint = Checkpoint(path, quantize="auto")
    assert checkpoint.keeps_codes
    for name, matrix in matrices.items():
        part = TensorPart(name=name, shape=matrix.shape)
        found = checkpoint.read_stacked([part], torch.float32)
        assert torch.equal(found, matrix.dequantized()), name
    bank = checkpoint.family.banks[0]
    source = CheckpointSource(checkpoint)
    for (_, _, weight), own in zip(
        source.weights(bank, 3, torch.float32), (("gate", "up"), ("down",)), strict=True
    ):
        expected = [matrices[f"{EXPERT}.{name}_proj.weight"] for name in own]
        assert isinstance(weight, QuantizedMatrix)
        assert torch.equal(weight.codes, torch.cat([m.codes for m in expected]))
        assert torch.equal(weight.scales, torch.cat([m.scales for m in expected]).float())
        assert (weight.zeros is None) == (expected[0].zeros is None)
        assert weight.nbytes == weight.format.num_bytes(weight.shape)


def test_bytes_are_those_on_disk(tmp_path: Path, settings: dict[str, Any]) -> None:
    path, _ = packed(tmp_path, settings)
    summary = check_checkpoint(path)
    others = (".g_idx", ".weight_shape")
    tensors = load_file(path / "model.safetensors").items()
    on_disk = sum(tensor.nbytes for name, tensor in tensors if not name.endswith(others))
    assert summary.attention_bytes + summary.expert_bytes == on_disk


def test_an_engine_computes_codes_as_the_numbers_that_they_stand_for(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    path, _ = packed(tmp_path, settings)
    params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=1)
    found = []
    for quantize in ("auto", "none"):
        engine = LocalEngine(path, dtype="float32", quantize=quantize)
        assert (engine.banks[0].exchanges[0].form is None) == (quantize == "none")
        (answer,) = engine.run([Request(request_id="r", prompt=(5, 6, 7), params=params)]).values()
        found.append([entry for output in answer for entry in output.logprobs])
    for one, other in zip(*found, strict=True):
        assert one.token_id == other.token_id
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def change(path: Path, name: str, change_to: torch.Tensor | None) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors[name]
    if change_to is not None:
        tensors[name] = change_to
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_columns_in_another_order_are_refused(tmp_path: Path) -> None:
    path, _ = packed(tmp_path, GPTQ)
    change(path, f"{EXPERT}.up_proj.g_idx", torch.arange(64, dtype=torch.int32).flip(0) // 8)
    checkpoint = Checkpoint(path, quantize="auto")
    with pytest.raises(CheckpointError, match=r"up_proj.g_idx: .* \(desc_act is not supported\)"):
        list(CheckpointSource(checkpoint).weights(checkpoint.family.banks[0], 3, torch.float32))


def test_zero_points_that_the_config_does_not_name_are_refused(tmp_path: Path) -> None:
    path, _ = packed(tmp_path, GPTQ)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["sym"] = True
    (path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(path, quantize="auto")
    with pytest.raises(CheckpointError, match=r"its zero points differ, though .* says sym"):
        list(CheckpointSource(checkpoint).weights(checkpoint.family.banks[0], 3, torch.float32))


@pytest.mark.parametrize("suffix", [".scales", ".qzeros"])
def test_what_is_missing_is_named(tmp_path: Path, suffix: str) -> None:
    path, _ = packed(tmp_path, SETTINGS["awq"])
    change(path, f"{EXPERT}.down_proj{suffix}", None)
    with pytest.raises(CheckpointError, match=rf"3.down_proj{suffix} \[.*\] is missing"):
        check_checkpoint(path, "auto")


def test_a_matrix_that_is_stored_in_no_way_is_named(tmp_path: Path) -> None:
    path, _ = packed(tmp_path, SETTINGS["awq"])
    change(path, f"{EXPERT}.down_proj.qweight", None)
    with pytest.raises(CheckpointError, match=r"3.down_proj.weight \[64, 48\] is missing"):
        check_checkpoint(path, "auto")


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
