"""The check of a checkpoint in a process of its own, with a predictor and without."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.checkpoints.random_checkpoint import TINY, write
from cluster.core.errors import CheckpointError, ConfigError
from cluster.launch.checkpoint_check import CheckpointCheck, CheckpointFacts, check


def facts_of(path: Path, *, has_predictor: bool) -> CheckpointFacts:
    return CheckpointCheck(path, os.environ, has_predictor=has_predictor).result()


def test_a_predictor_has_experts_and_kv_of_its_own(tmp_path: Path) -> None:
    path = write(replace(TINY, family="glm4_moe", prediction_layers=1), tmp_path / "model")
    plain, more = (facts_of(path, has_predictor=asked) for asked in (False, True))
    assert len(more.banks) == len(plain.banks) + 1
    assert more.banks[-1]["layer"] == TINY.layers
    assert more.kv_vectors_per_token * TINY.layers == plain.kv_vectors_per_token * (TINY.layers + 1)
    assert more.attention_weights > plain.attention_weights
    assert plain.ignored_keys == ("num_nextn_predict_layers",)
    assert more.ignored_keys == ()
    assert (plain.is_captured, more.is_captured) == (True, False)


def test_a_checkpoint_without_one_is_refused_by_name(tmp_path: Path) -> None:
    path = write(replace(TINY, family="deepseek_v3"), tmp_path / "model")
    with pytest.raises(CheckpointError, match="num_nextn_predict_layers must be at least 1"):
        facts_of(path, has_predictor=True)


@pytest.mark.parametrize(
    ("family", "is_captured"),
    [("olmoe", True), ("jetmoe", False), ("deepseek_v3", False), ("qwen3_next", False)],
)
def test_some_models_have_no_graphs_on_gpus(family: str, is_captured: bool, tmp_path: Path) -> None:
    """Outputs of single experts, latent attention and recurrent states."""
    model = replace(TINY, family=family)
    (tmp_path / "config.json").write_text(json.dumps(model.config()))
    facts = check(tmp_path, allow_bare=True)
    assert facts.size("bfloat16", None).is_captured is is_captured


def test_instructions_that_do_not_exist_are_refused_before_the_start(tiny_checkpoint: Path) -> None:
    environ = {**os.environ, "EXPERTMESH_MAX_INSTRUCTIONS": "avx9"}
    rule = "EXPERTMESH_MAX_INSTRUCTIONS 'avx9' must be one of avx512_bf16, avx512, avx2"
    with pytest.raises(CheckpointError, match=rule):
        CheckpointCheck(tiny_checkpoint, environ).result()


def test_a_dtype_that_is_no_compute_dtype_is_refused_by_name(tmp_path: Path) -> None:
    path = write(TINY, tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config["dtype"] = config["torch_dtype"] = "float64"
    (path / "config.json").write_text(json.dumps(config))
    facts = check(path, quantize="int8")
    assert facts.itemsize("bfloat16") == 2
    with pytest.raises(ConfigError, match=r"dtype \(float64\) must be one of float32, bfloat16"):
        facts.size("auto", None)
