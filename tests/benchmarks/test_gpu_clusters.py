"""Predictions for clusters of GPUs."""

from __future__ import annotations

import json

import pytest

from benchmarks.simulated import gpu_clusters


def test_a_cheaper_message_is_never_slower(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--models", "OLMoE-1B-7B-0924", "--gpus", "16", "--max-seqs", "2"]
    assert gpu_clusters.main([*arguments, "--rounds", "1", "--json"]) == 0
    dear, cheap = map(json.loads, capsys.readouterr().out.splitlines())
    assert (
        (dear["layout"], dear["num_seqs"]) == (cheap["layout"], cheap["num_seqs"]) == ("8 + 8", 32)
    )
    assert dear["message_us"] == pytest.approx(8 * cheap["message_us"])
    assert dear["decode_step_ms"] > cheap["decode_step_ms"]
    for name in ("prompt", "decode", "input", "output"):
        assert 0 < dear[f"{name}_tokens_per_s_gpu"] < cheap[f"{name}_tokens_per_s_gpu"]
    assert dear["input_tokens_per_s_gpu"] == pytest.approx(10 * dear["output_tokens_per_s_gpu"])


def test_only_whole_nodes_are_simulated(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_clusters.main(["--gpus", "12"])
    assert "--gpus: must be a multiple of 8, the GPUs of a node" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_clusters.main(["--models", "DeepSeek-V3", "--gpus", "16", "--gpu", "H100"]) == 0
    assert "DeepSeek-V3 on 16: num_nodes (2) of H100-80GB are too few" in capsys.readouterr().err
