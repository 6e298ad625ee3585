"""The benchmarks run, and their file is written as promised. Speed itself is not tested."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import results, run, serving
from benchmarks.quiet import CpuClock, wait_until_quiet
from benchmarks.serving import QUICK, TINY, measure, random_model, report
from benchmarks.timing import Sample, median_of, ratio_of, sample_of

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None


def _sample(tokens_per_s: float, itl_ms: float = 1.0) -> Sample:
    return Sample(
        tokens_per_s=tokens_per_s,
        prefill_s=0.5,
        decode_tokens_per_s=2 * tokens_per_s,
        itl_ms=itl_ms,
        others_cores=0.0,
    )


def test_numbers_of_a_batch_come_from_the_span_in_which_all_decode() -> None:
    early, late = [1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]
    assert sample_of([early, late], others_cores=0.5) == Sample(
        tokens_per_s=8 / 5,
        prefill_s=2.0,
        decode_tokens_per_s=4 / 2,
        itl_ms=1000.0,
        others_cores=0.5,
    )


def test_a_batch_without_such_a_span_counts_what_follows_the_prefill() -> None:
    found = sample_of([[1.0, 2.0], [3.0, 4.0]])
    assert (found.decode_tokens_per_s, found.itl_ms) == (1.0, 1000.0)


def test_median_and_ratio_go_over_the_turns() -> None:
    samples = [_sample(1.0), _sample(100.0), _sample(3.0)]
    assert median_of(samples).tokens_per_s == 3.0
    base = [_sample(1.0), _sample(50.0), _sample(1.0)]
    assert ratio_of(samples, base).total == 2.0


def test_a_section_is_added_then_replaced_and_notes_survive(tmp_path: Path) -> None:
    file = tmp_path / "RESULTS.md"
    results.write_section(file, "serving", "first")
    results.write_section(file, "dispatch", "other")
    file.write_text(file.read_text() + "\nA note.\n")
    results.write_section(file, "serving", r"second \1")
    text = file.read_text()
    assert "first" not in text
    assert "<!-- begin serving -->\nsecond \\1\n<!-- end serving -->" in text
    assert "<!-- begin dispatch -->\nother\n<!-- end dispatch -->" in text
    assert text.startswith("# Benchmark results")
    assert text.endswith("\nA note.\n")


def test_the_report_has_a_row_per_system_and_the_ratios() -> None:
    turns = {"transformers": [_sample(10.0)], "local": [_sample(20.0)], "ray": [_sample(15.0)]}
    lines = report("Model", QUICK, {1: turns, 8: turns}).splitlines()
    assert lines[0] == "### Model"
    assert "| 8, (b) local engine | 20.0 | 0.500 | 40.0 | 1.00 | 0.0 |" in lines
    assert lines[-1] == "| 8 | 2.00 | 2.00 | 0.75 | 0.75 |"
    assert {line.count("|") for line in lines[2:10]} == {7}


def test_the_report_does_without_transformers() -> None:
    lines = report("Model", QUICK, {1: {"local": [_sample(2.0)], "ray": [_sample(1.0)]}})
    assert "transformers" not in lines
    assert lines.endswith("| 1 | 0.50 | 0.50 |")


def test_a_busy_neighbour_is_seen_and_own_work_is_not() -> None:
    start = CpuClock(wall_s=0.0, all_s=10.0, own_s=4.0)
    assert start.others(CpuClock(wall_s=2.0, all_s=14.0, own_s=5.0)) == 1.5
    begin, now = time.monotonic(), CpuClock.now()
    wait_until_quiet(begin)
    assert time.monotonic() - begin < 0.5
    assert CpuClock.now().all_s >= now.all_s


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--only", "serving,nothing"])
    assert "--only: nothing is not one of" in capsys.readouterr().err


@pytest.mark.distributed
@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed")
def test_processes_with_the_whole_model_are_measured() -> None:
    case = replace(QUICK, systems=("transformers", "local"))
    with random_model(TINY) as checkpoint:
        found = measure(checkpoint, case)
    assert {name: len(turns) for name, turns in found[2].items()} == {"transformers": 1, "local": 1}
    assert "local engine" in report("Tiny", case, found)


@pytest.mark.ray
def test_ray_workers_are_measured() -> None:
    with random_model(TINY) as checkpoint:
        found = measure(checkpoint, replace(QUICK, systems=("ray",)))
    assert found[2]["ray"][0].itl_ms > 0
    assert serving.LABELS["ray"] in report("Tiny", QUICK, found)
