"""Checkpoints of GPTQ, AWQ and compressed-tensors: as stored, as read, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.harness.local_engine import LocalEngine
from cluster.core.errors import CheckpointError
from tests.harness.tiers import quick_rows
from tests.reference.goldens import golden_path
from tests.workers.model.loading.packers import pack_checkpoint
from tests.workers.quantization.configs import GPTQ, SETTINGS
from workers.experts.sources import CheckpointSource
from workers.model.config import TensorPart
from workers.model.loading.checkpoint import Checkpoint
from workers.model.loading.checkpoint_summary import check_checkpoint
from workers.quantization.matrix import QuantizedMatrix
from workers.requests.request import Request, SamplingParams

pytestmark = pytest.mark.heavy

EXPERT = "model.layers.0.mlp.experts.3"
QUICK = {"gptq", "gptq-8-bits-rows", "awq", "auto-round-v2", "tensors-zeros-short-group"}
"""One of each kind of codes."""


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


@pytest.mark.parametrize("name", quick_rows(QUICK, SETTINGS))
def test_bytes_are_those_on_disk(tmp_path: Path, name: str) -> None:
    path, _ = packed(tmp_path, SETTINGS[name])
    summary = check_checkpoint(path)
    others = (".g_idx", ".weight_shape")
    tensors = load_file(path / "model.safetensors").items()
    on_disk = sum(tensor.nbytes for name, tensor in tensors if not name.endswith(others))
    assert summary.attention_bytes + summary.expert_bytes == on_disk


@pytest.mark.parametrize("name", quick_rows(QUICK, SETTINGS))
def test_an_engine_computes_codes_as_the_numbers_that_they_stand_for(
    tmp_path: Path, name: str
) -> None:
    path, _ = packed(tmp_path, SETTINGS[name])
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
    with pytest.raises(CheckpointError, match=r"its zero points differ, although .* equal"):
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
