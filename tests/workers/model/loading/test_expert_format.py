"""The form in which experts are kept, where not all are stored in codes, and what is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.checkpoints.random_checkpoint import TINY, write
from benchmarks.harness.local_engine import LocalEngine
from cluster.config.model import Quantize
from cluster.config.speculation import SpeculationSection
from cluster.core.errors import ConfigError
from tests.reference.goldens import golden_path
from tests.workers.model.loading.packers import pack_checkpoint
from workers.model.config import TensorPart
from workers.model.families.base import Family
from workers.model.loading.checkpoint import Checkpoint
from workers.model.loading.checkpoint_summary import plan_checkpoint
from workers.model.loading.expert_format import rounded_form, stored_experts
from workers.quantization.storage_format import parse_storage_format
from workers.requests.request import Request, SamplingParams

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}
FORM = "int4 in groups of 8"
PARAMS = SamplingParams(max_tokens=8, temperature=0.0, logprobs=1)


def packed(tmp_path: Path, plain: str) -> Path:
    """OLMoE with 3 layers in codes, but for matrices with names that begin so."""
    path = Path(shutil.copytree(golden_path("olmoe-norm-gqa-clip"), tmp_path / "packed"))
    pack_checkpoint(path, AWQ, plain)
    return path


def forms(family: Family) -> list[str]:
    return [str(e.form or "") for bank in family.banks for e in bank.exchanges]


def answers(engine: LocalEngine) -> list[tuple[int, float]]:
    (answer,) = engine.run([Request(request_id="r", prompt=(5, 6, 7), params=PARAMS)]).values()
    return [(entry.token_id, entry.logprob) for output in answer for entry in output.logprobs]


@pytest.mark.parametrize(
    ("plain", "expected", "obstacle"),
    [
        (" ", [FORM, FORM, FORM], ""),
        ("model.layers.1.", [FORM, "", FORM], ""),
        (
            "model.layers.1.mlp.experts.2.down_proj",
            [FORM, "", FORM],
            "1 of 3 exchanges: model.layers.1.mlp.experts.2.down_proj.weight is not quantized",
        ),
    ],
)
def test_a_layer_that_is_not_stored_in_codes_leaves_the_codes_of_others(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    plain: str,
    expected: list[str],
    obstacle: str,
) -> None:
    path = packed(tmp_path, plain)
    kept = LocalEngine(path, dtype="float32")
    assert [str(e.form or "") for bank in kept.banks for e in bank.exchanges] == expected
    messages = [record.getMessage() for record in caplog.records if "dequantized" in record.msg]
    assert len(messages) == bool(obstacle)
    assert obstacle in "".join(messages)
    decoded = LocalEngine(path, dtype="float32", quantize="none")
    for one, other in zip(answers(kept), answers(decoded), strict=True):
        assert one[0] == other[0]
        assert one[1] == pytest.approx(other[1], abs=1e-4)


def test_a_prediction_layer_that_is_not_stored_in_codes_leaves_those_of_the_model(
    tmp_path: Path,
) -> None:
    path = write(replace(TINY, family="glm4_moe", prediction_layers=1), tmp_path / "model")
    (path / "model-00001-of-00001.safetensors").rename(path / "model.safetensors")
    (path / "model.safetensors.index.json").unlink()
    pack_checkpoint(path, AWQ, plain=f"model.layers.{TINY.layers}.")
    plain = Checkpoint(path, quantize="auto")
    predicting = Checkpoint(path, quantize="auto", has_predictor=True)
    assert set(forms(plain.family)) == {FORM}
    assert forms(predicting.family) == [*forms(plain.family), ""]
    section = SpeculationSection(speculative_method="mtp")
    found = answers(LocalEngine(predicting, dtype="float32", speculation=section))
    assert found == answers(LocalEngine(plain, dtype="float32"))


@pytest.mark.parametrize("setting", ["int8", "int4"])
@pytest.mark.parametrize(
    ("variant", "form"),
    [("qwen3moe-fp8", "e4m3 in groups of 16"), ("gptoss-official-like", "e2m1 in groups of 32")],
)
def test_codes_are_not_quantized_again(setting: Quantize, variant: str, form: str) -> None:
    path = golden_path(variant, variant.split("-")[0])
    for read in (Checkpoint, plan_checkpoint):
        with pytest.raises(ConfigError) as refused:
            read(path, quantize=setting)
        assert str(refused.value) == (
            f"quantize ({setting}) must be auto or none: the checkpoint stores experts as {form}, "
            "which auto keeps and none decodes"
        )


def test_codes_that_kernels_cannot_use_may_be_quantized_again() -> None:
    stored = parse_storage_format({"quant_method": "fp8", "weight_block_size": [12, 12]})
    part, dtypes = TensorPart(name="x.weight", shape=(24, 24)), {"x.weight": "F8_E4M3"}
    found = stored_experts([part], stored, dtypes)
    assert found.form is None
    assert found.obstacle == "groups of 12 are not a multiple of 8"
    stored = parse_storage_format({"quant_method": "fp8", "weight_block_size": [8, 8]})
    for own in (replace(part, is_transposed=True), replace(part, shape=(24, 23))):
        found = stored_experts([own], stored, dtypes)
        assert found.form is None
        assert found.obstacle == "x.weight has no rows of an even length"
    assert stored_experts([part], stored, dtypes).form is not None


def test_the_layer_of_an_odd_width_is_named() -> None:
    bank = Checkpoint(golden_path("olmoe-base", "olmoe")).family.banks[1]
    odd = replace(bank, exchanges=(replace(bank.exchanges[0], in_width=23),))
    with pytest.raises(ConfigError, match="needs experts of even widths, one of layer 1 is 23"):
        rounded_form("int8", [odd])
    assert rounded_form("auto", [odd]) is None
