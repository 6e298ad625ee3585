"""``plan simulate`` of requests: options in, predictions out, no cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.main import main
from cluster.cli.terminal.exit_codes import ExitCode
from tests.cluster.cli.exits import exit_code

LAYOUT = ["--num-attention-workers", "8", "--num-expert-workers", "8"]


def predict(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["plan", "simulate", "--json", "--gpu", "H100", *options]) == ExitCode.OK
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_trace_of_requests_is_predicted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "requests.jsonl"
    rows = [{"timestamp": 100 * i, "input_length": 50 + i, "output_length": 4} for i in range(20)]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = predict(capsys, *LAYOUT, "--nodes", "2", "--trace", str(trace), "--trace-speed", "4")
    results = found["results"]
    assert found["layout"] == "8 attention + 8 expert workers"
    assert results["successful"] == 20
    assert results["prompt_tokens"] == sum(row["input_length"] for row in rows)
    assert results["output_tokens"] == 80
    assert results["duration_s"] == pytest.approx(1.9 / 4, rel=0.1)
    assert results["ttft_ms"]["p99"] > results["itl_ms"]["median"] > 0
    assert 0 < results["steps"]["host_share"] < 1


def test_colocated_workers_and_text(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "simulate", "--device", "cpu", "--num-prompts", "8", "--random-output-len=4"]
    layout = ["--num-attention-workers", "2", "--num-expert-workers", "0"]
    assert main([*command, *layout]) == ExitCode.OK
    text = capsys.readouterr()
    assert "8 requests in" in text.out
    assert "TTFT ms" in text.out
    assert "2 colocated workers" in text.err


@pytest.mark.parametrize("share", ["yes", "no", "auto"])
def test_step_groups_are_predicted(capsys: pytest.CaptureFixture[str], share: str) -> None:
    layout = ["--num-prefill-workers", "2", "--num-decode-workers", "2", "--share-experts", share]
    found = predict(capsys, *layout, "--num-expert-workers", "4", "--goodput", "itl:1000")
    expected = {
        "yes": ["2 prefill + 2 decode + 4 expert workers"],
        "no": ["2 prefill + 2 decode + 2 + 2 expert workers"],
    }
    assert found["layout"] in expected.get(share, expected["yes"] + expected["no"])
    assert bool(found["layout_reason"]) == (share == "auto")
    assert found["results"]["successful"] == 100
    assert found["results"]["good_requests_per_s"] > 0
    assert 0 < found["results"]["steps"]["experts_share"] < 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--num-prefill-workers", "1"], "num_decode_workers"),
        (["--share-experts", "no"], "--share-experts (no) must be yes without"),
        (
            ["--num-prefill-workers=1", "--num-decode-workers=1", "--num-attention-workers=2"],
            "num_attention_workers",
        ),
        (
            ["--num-prefill-workers=1", "--num-decode-workers=1", "--num-expert-workers=0"],
            "mode (colocated) must be disaggregated",
        ),
        (["--num-expert-workers", "1000"], "num_expert_workers"),
        (["--num-expert-workers", "0", "--num-attention-workers", "999"], "num_attention_workers"),
        (["--kv-cache-bytes", "1"], "--kv-cache-bytes (1) must hold 16 tokens"),
        (["--trace", "missing.jsonl"], "missing.jsonl"),
        (["--devices", "4"], "--devices needs --trace"),
    ],
)
def test_invalid_options_are_named(
    capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert exit_code("plan", "simulate", *options) != ExitCode.OK
    assert said in capsys.readouterr().err
