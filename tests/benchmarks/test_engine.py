"""The benchmarks of the local engine on the bundled checkpoint, in tiny sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.engine import batches as engine
from benchmarks.engine import profile
from benchmarks.engine.profile import STAGES, StepSums
from benchmarks.report.timing import decode_interval_of
from cluster.cli.main import main
from cluster.cli.terminal.exit_codes import ExitCode
from tests.harness.step_traces import read_spans
from workers.requests.step_header import Grant, Grants, StepHeader

TINY = ["--input-len", "5", "--output-len", "4", "--threads", "1", "--device", "cpu"]


def measured(capsys: pytest.CaptureFixture[str], command: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["command"]) == (1, f"benchmarks.{command}")
    return document


def test_rates_by_batch(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "engine.json"
    asked = [*TINY, "--batch", "3,1", "--repeats", "1", "--save", str(path)]
    assert engine.main(asked) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["BATCH", "1", "3"]
    assert all(float(cell) > 0 for line in lines[1:] for cell in line[1:])
    document = json.loads(path.read_text())
    assert (document["schema"], document["command"]) == (1, "benchmarks.engine")
    assert document["options"]["dtype"] == "bfloat16"
    assert set(document["results"]["batches"]) == {"1", "3"}
    assert main(["bench", "compare", str(path), str(path)]) == ExitCode.OK


def test_a_single_token_has_no_rate_of_decoding(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*TINY, "--output-len", "1", "--batch", "2", "--repeats", "1"]
    assert engine.main([*asked, "--dtype", "float32", "--json"]) == 0
    document = measured(capsys, "engine")
    assert document["options"]["dtype"] == "float32"
    rates = document["results"]["batches"]["2"]
    assert rates["prefill_tokens_per_s"] > 0
    assert (rates["decode_tokens_per_s"], rates["itl_ms"]) == (None, None)


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    asked = [*TINY, "--batch", "1", "--repeats", "1", "--threads", "2"]
    assert engine.main(asked) == 0
    assert torch.get_num_threads() == before


def test_what_does_not_fit(tmp_path: Path) -> None:
    few = ["--kv-cache-bytes", "64K", "--batch", "64", "--input-len", "100"]
    with pytest.raises(SystemExit, match="--kv-cache-bytes"):
        engine.main([*TINY, *few])
    with pytest.raises(SystemExit, match="limit"):
        profile.main([*TINY, "--input-len", "100000"])
    with pytest.raises(SystemExit, match=r"no config\.json"):
        engine.main([str(tmp_path), *TINY])


def test_the_stages_of_a_step(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = [*TINY, "--batch", "2", "--trace-dir", str(tmp_path), "--json"]
    assert profile.main(asked) == 0
    phases = measured(capsys, "profile")["results"]["phases"]
    assert {name: found["steps"] for name, found in phases.items()} == {"prefill": 1, "decode": 3}
    for found in phases.values():
        stages = found["stages_ms"]
        assert set(stages) == set(STAGES)
        assert sum(stages.values()) == pytest.approx(found["step_ms"], rel=1e-4)
        assert min(stages["attention"], stages["dispatch"], stages["sample"]) > 0
    warm_up_and_run = [span for span in read_spans(tmp_path) if span.name == "step"]
    assert len(warm_up_and_run) == 2 + 4


def test_a_table_of_stages(capsys: pytest.CaptureFixture[str]) -> None:
    assert profile.main([*TINY, "--batch", "1"]) == 0
    shown = capsys.readouterr()
    lines = [line.split() for line in shown.out.splitlines()]
    assert lines[1][:3] == ["decode", "3", "steps"]
    assert [line[0] for line in lines[2:7]] == list(STAGES)
    assert "the experts" in shown.err


def test_spans_are_added_up_by_phase() -> None:
    sums = StepSums()
    for step, grant in enumerate((Grant(prefill_rows=4), Grant(decode_rows=2)), 1):
        header = StepHeader(
            generation=1, step=step, epoch=1, oldest_epoch=1, grants=Grants.of({0: grant})
        )
        for _ in range(step):
            assert sums.begin_step(header)
            sums.add("attention", 0, 2_000_000, {})
            sums.add("step", 0, 5_000_000, {})
            sums.flush()
    results = sums.results()
    assert (results["prefill"]["steps"], results["decode"]["steps"]) == (1, 2)
    assert results["decode"]["step_ms"] == 5.0
    assert results["decode"]["stages_ms"] == {
        "attention": 2.0,
        "dispatch": 0.0,
        "combine": 0.0,
        "sample": 0.0,
        "rest": 3.0,
    }
    sums.clear()
    assert sums.results() == {}


def test_an_interval_of_few_tokens_is_all_that_follows_the_prefill() -> None:
    found = decode_interval_of([[1.0, 2.0], [3.0, 4.0]])
    assert (found.begin_s, found.end_s, found.tokens, found.gaps_s) == (3.0, 4.0, 1, (1.0,))
    assert (found.tokens_per_s, found.median_gap_ms) == (1.0, 1000.0)
    single = decode_interval_of([[1.0], [2.0]])
    assert (single.tokens_per_s, single.median_gap_ms) == (None, None)
