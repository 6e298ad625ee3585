"""The benchmarks run, and their file is written as promised. Speed itself is not tested."""

from __future__ import annotations

import importlib.util
import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import run
from benchmarks.checkpoints.random_checkpoint import RandomModel
from benchmarks.engine import (
    delta_net,
    kv_accuracy,
    kv_cache,
    load_tracking,
    prefix_cache,
    speculation,
    step_cost,
)
from benchmarks.harness.local_engine import LocalEngine
from benchmarks.placement import rebalancing
from benchmarks.report import results
from benchmarks.report.quiet import CpuClock, wait_until_quiet
from benchmarks.report.timing import Sample, median_of, ratio_of, sample_of
from benchmarks.serving import (
    colocated,
    deterministic,
    families,
    gateway_cost,
    itl_target,
    micro_batches,
    watching,
)
from benchmarks.serving import throughput as serving
from benchmarks.serving.throughput import QUICK, TINY, measure, random_model, report
from tests.long import soak
from workers.requests.request import SamplingParams

pytestmark = pytest.mark.heavy

COUNTS = ("launches", "waits", "copies")
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None


def test_rebalancing_reports_what_clients_saw() -> None:
    case = rebalancing.Case(before_s=10.0, after_s=20.0, settled_s=5.0, fresh_s=9.0)
    last = {"epoch": 3, "text": "filled 4 slots"}

    def tokens(*intervals: tuple[float, float, float]) -> list[list[float | None]]:
        """Tokens at a fixed interval, in each part of the time."""
        return [[a + i * gap, gap] for a, b, gap in intervals for i in range(round((b - a) / gap))]

    events = [
        {"at": 0.0, "epoch": 1, "phase": "", "moves": False, "last": None},
        {"at": 12.0, "epoch": 1, "phase": "stage 1", "moves": True, "last": None},
        {"at": 14.0, "epoch": 3, "phase": "", "moves": False, "last": last},
    ]
    shifted = tokens((0, 10, 0.1), (10, 12, 0.2), (12, 14, 0.25), (14, 30, 0.2))
    found = {
        "shift": {"tokens": shifted, "marks": [0.0, 10.0], "events": events},
        "fresh": {"tokens": tokens((0, 9, 0.1)), "marks": [0.0], "events": []},
    }
    assert rebalancing.intervals_of(case, found["shift"])["moving"] == [(12.0, 14.0)]
    text = rebalancing.report(case, found)
    assert "| second domain, before the first rebalance | 5 | 200.0 | 200.0 |" in text
    assert "| second domain, during rebalances | 4 | 250.0 | 250.0 |" in text
    assert "| second domain, between rebalances | 5 | 200.0 | 200.0 |" in text
    assert "s is 0.500 of the new cluster's" in text
    assert "is 1.25 times the p99 between them" in text
    assert "- epoch 3: filled 4 slots" in text
    assert rebalancing.plot(case, found).count("<rect") == 2


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


def test_median_and_ratio_go_over_the_runs() -> None:
    samples = [_sample(1.0), _sample(100.0), _sample(3.0)]
    assert median_of(samples).tokens_per_s == 3.0
    base = [_sample(1.0), _sample(50.0), _sample(1.0)]
    assert ratio_of(samples, base).total == 2.0


def test_a_section_is_added_then_replaced_and_notes_survive(tmp_path: Path) -> None:
    file = tmp_path / "serving.md"
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
    runs = {"transformers": [_sample(10.0)], "local": [_sample(20.0)], "ray": [_sample(15.0)]}
    lines = report("Model", QUICK, {1: runs, 8: runs}).splitlines()
    assert lines[0] == "### Model"
    assert "| 8, (b) local engine | 20.0 | 0.500 | 40.0 | 1.00 | 0.0 |" in lines
    assert lines[-1] == "| 8 | 2.00 | 2.00 | 0.75 | 0.75 |"
    assert {line.count("|") for line in lines[2:10]} == {7}


def test_the_report_does_without_transformers() -> None:
    lines = report("Model", QUICK, {1: {"local": [_sample(2.0)], "ray": [_sample(1.0)]}})
    assert "transformers" not in lines
    assert lines.endswith("| 1 | 0.50 | 0.50 |")


def test_micro_batches_have_a_row_per_batch() -> None:
    samples = {
        micro_batches.ONE: [_sample(10.0)],
        micro_batches.TWO: [_sample(12.0)],
    }
    lines = micro_batches.report("Model", {8: samples}).splitlines()
    assert lines[-1] == "| 8 | 20.0 | 24.0 | 1.20 | 0.500 | 0.500 | 1.20 | 0.0 |"
    assert {line.count("|") for line in lines[2:]} == {9}


def test_deterministic_has_a_row_per_batch_and_layout() -> None:
    samples = {
        name: [_sample(10.0 if "deterministic" not in name else 8.0)]
        for name in deterministic.SYSTEMS
    }
    lines = deterministic.report("Model", {1: samples, 8: samples}).splitlines()
    assert lines[-1] == "| 8, 1 + 1 workers | 10.0 | 8.0 | 0.80 | 0.500 | 0.500 | 0.80 |"
    assert [line.split(" |")[0] for line in lines[4:6]] == [
        "| 1, local engine",
        "| 1, 1 + 1 workers",
    ]


def test_a_busy_neighbour_is_seen_and_own_work_is_not() -> None:
    start = CpuClock(wall_s=0.0, all_s=10.0, own_s=4.0)
    assert start.others(CpuClock(wall_s=2.0, all_s=14.0, own_s=5.0)) == 1.5
    now = CpuClock.now()
    wait_until_quiet(time.monotonic())  # no time left: it does not wait
    assert CpuClock.now().all_s >= now.all_s


def test_the_prefix_cache_is_measured_on_and_off() -> None:
    case = replace(prefix_cache.QUICK, repeats=2)
    with random_model(TINY) as checkpoint:
        found = prefix_cache.measure(checkpoint, case)
    assert [run.hit_rate for run in found[False]] == [0, 0]
    # two at a time: all but the first two find the two full blocks among the 40 common tokens
    assert [run.hit_rate for run in found[True]] == [pytest.approx(2 * 32 / (4 * 44))] * 2
    assert all(run.tokens_per_s > 0 for runs in found.values() for run in runs)
    lines = list(prefix_cache.rows_of("tiny", found))
    assert [line[0] for line in lines] == ["tiny, off", "tiny, on", "tiny, on / off"]
    assert {len(line) for line in lines} == {6}


def test_drafts_are_measured_where_text_repeats_and_where_not() -> None:
    with speculation.chain_model(TINY) as checkpoint:
        found = speculation.measure(checkpoint, replace(speculation.QUICK, repeats=2))
    copied, others = found.values()
    for runs in (copied.drafts, copied.without, others.drafts, others.without):
        assert len(runs) == 2
        assert all(one.tokens_per_s > 0 for one in runs)
    for one, other in zip(copied.drafts, copied.without, strict=True):
        assert 0 < one.num_accepted == one.num_drafted
        assert one.num_steps < other.num_steps
        assert other.num_drafted == 0
        assert one.tokens_per_step > other.tokens_per_step == 1.0
    lines = speculation.report(found).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["copy", "nothing repeats"]
    assert len({line.count("|") for line in lines}) == 1


def test_tokens_of_a_step_are_those_of_each_sequence() -> None:
    """Three tokens in one step and a step with one, then two steps with one each."""
    times = [[0.1, 0.2, 0.2, 0.2, 0.3], [0.1, 0.2, 0.3]]
    assert speculation.tokens_per_step(times) == 1.5


def test_drafts_of_a_prediction_layer_have_a_part_of_their_own() -> None:
    lines = speculation.prediction_section(quick=True).splitlines()
    assert lines[0] == "### Prediction layer"
    rows = [[cell.strip() for cell in line.split("|")] for line in lines if "predicted" in line]
    assert [row[2] for row in rows] == ["1", "4"]


def test_the_latency_target_has_a_row_on_and_off() -> None:
    with random_model(TINY) as checkpoint:
        found = itl_target.measure(checkpoint, itl_target.QUICK)
    assert [len(runs) for runs in found.values()] == [1, 1]
    (run,) = found[1.0]
    assert 0 < run.itl_ms <= run.slow_itl_ms <= run.slowest_itl_ms
    assert run.ttft_ms > 0
    lines = itl_target.report(found).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| off", "| 1"]


def test_an_unknown_benchmark_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--only", "serving,nothing"])
    assert "--only: nothing is not one of" in capsys.readouterr().err


@pytest.mark.parametrize("name", families.TINY_MODELS)
def test_random_models_of_all_families_can_be_served(name: str) -> None:
    with random_model(families.TINY_MODELS[name]) as checkpoint:
        found = LocalEngine(checkpoint).generate([[5, 6, 7]], SamplingParams(max_tokens=3))
    assert len(found[0].token_ids) == 3


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(not HAS_TRANSFORMERS, reason="transformers is not installed")
@pytest.mark.parametrize(
    "model",
    [
        pytest.param(m, marks=() if m is TINY else pytest.mark.slow, id=m.family)
        for m in (TINY, *families.TINY_MODELS.values())
    ],
)
def test_processes_with_the_whole_model_are_measured(model: RandomModel) -> None:
    case = replace(QUICK, systems=("transformers", "local"))
    with random_model(model) as checkpoint:
        found = measure(checkpoint, case)
    assert {name: len(runs) for name, runs in found[2].items()} == {"transformers": 1, "local": 1}
    assert "local engine" in report("Tiny", case, found)


@pytest.mark.ray
@pytest.mark.slow
def test_ray_workers_are_measured() -> None:
    with random_model(TINY) as checkpoint:
        found = measure(checkpoint, replace(QUICK, systems=("ray",)))
    assert found[2]["ray"][0].itl_ms > 0
    assert serving.LABELS["ray"] in report("Tiny", QUICK, found)


@pytest.mark.ray
@pytest.mark.slow
def test_colocated_workers_are_measured() -> None:
    with random_model(TINY) as checkpoint:
        found = measure(checkpoint, replace(QUICK, systems=("ray-colocated",)))
    (sample,) = found[2]["ray-colocated"]
    assert sample.itl_ms > 0


def test_the_colocated_report_compares_three_layouts() -> None:
    runs = {"local": [_sample(10.0)], "ray": [_sample(20.0)], "ray-colocated": [_sample(30.0)]}
    lines = colocated.report("Model", {8: runs}).splitlines()
    assert (
        lines[-1] == "| 8, 2 colocated workers | 30.0 | 0.500 | 60.0 | 1.00 | 3.00 | 1.50 | 0.0 |"
    )


def test_load_tracking_is_measured_beside_the_steps() -> None:
    text = load_tracking.section(quick=True)
    assert text.startswith("## Load tracking")
    assert text.count("\n| bundled, 2 |") == 1
    cost = load_tracking.Cost(steps_s=4.0, num_steps=100, tracking_s=0.02, report_s=0.01)
    assert cost.percent == pytest.approx(1.0)


def test_a_step_is_measured_by_part() -> None:
    text = step_cost.section(quick=True)
    assert text.startswith("## A step outside the model")
    (row,) = [line for line in text.splitlines() if line.startswith("| greedy, 3 |")]
    *parts, whole = (float(cell) for cell in row.strip("|").split("|")[1:])
    assert len(parts) == len(step_cost.PARTS)
    assert sum(parts) == pytest.approx(whole, abs=len(parts))


def test_the_host_s_cost_of_a_gpu_step_does_not_grow_with_its_layers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    from benchmarks.engine import host_cost

    assert host_cost.main(["--json", "--layers", "2", "9", "--batch", "3"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["side"], row["layers"]) for row in rows] == [
        (side, layers) for side in host_cost.SIDES for layers in (2, 9)
    ]
    for few, many in zip(rows[::2], rows[1::2], strict=True):
        assert few["host_us"] > 0 < many["host_us"]
        assert [few[name] for name in COUNTS] == [many[name] for name in COUNTS]
        assert few["waits"] == 1
    assert [rows[2][name] for name in COUNTS] == [1, 1, 1], "the expert side is one graph"


def test_costs_of_large_clusters_are_rows_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.engine import scale

    assert scale.main(["--json", "--members", "4", "12", "--steps", "3", "--rounds", "1"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = ["leader", "header", "proposal", "grants", "loss", "scrape"]
    names += ["start", "beats", "load", "status", "page", "scheduler", "admission", "rank"]
    assert [(r["what"], r["members"]) for r in rows] == [(w, n) for n in (4, 12) for w in names]
    assert all(row["us"] > 0 for row in rows)
    for number in range(0, len(rows), len(names)):
        costs = {row["what"]: row["us"] for row in rows[number : number + len(names)]}
        assert costs["rank"] == pytest.approx(sum(costs[w] for w in scale.OF_A_RANK), abs=0.5)


def test_prompts_of_paced_workers_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.engine import prompt_scaling

    assert prompt_scaling.main(["--workers", "1", "2", "--prompts", "1"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["1", "2"]


def test_caches_of_both_types_are_measured() -> None:
    text = kv_cache.section(quick=True)
    assert text.startswith("## KV cache in fp8")
    (row,) = [line for line in text.splitlines() if line.startswith("| 2/1 x 16 |")]
    plain_us, fp8_us, _, blocks = (float(cell) for cell in row.strip("|").split("|")[3:])
    assert plain_us > 0 < fp8_us
    assert blocks == pytest.approx(32 / 17, abs=0.01)


def test_forms_of_gated_delta_net_are_measured() -> None:
    text = delta_net.section(quick=True)
    assert text.startswith("## Gated DeltaNet")
    (row,) = [line for line in text.splitlines() if line.startswith("| 2 x 3 |")]
    assert all(float(cell) >= 0 for cell in row.strip("|").split("|")[1:])


def test_answers_with_caches_of_both_types_are_compared() -> None:
    """The bundled model needs about as many bits for a text with keys and values in fp8."""
    text = kv_accuracy.section(quick=True)
    assert text.startswith("## Accuracy of a KV cache in fp8")
    cells = [line.strip("|").split("|") for line in text.splitlines() if "float" in line]
    found = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells if len(row) == 5}
    exact, rounded = found["float32, float32"], found["float32, fp8"]
    assert exact[1:] == ["100.00%", "64.0", "5 of 5"]
    assert 0.0 < abs(float(rounded[0]) - float(exact[0])) < 0.02
    assert 95.0 < float(rounded[1].rstrip("%")) < 100.0


def test_growth_and_leaks_are_seen() -> None:
    times = [float(t) for t in range(0, 101, 5)]
    process = soak.Process(
        "grows", times, [100 if t < 25 else 100 + (t - 25) / 15 for t in times], [9] * 21
    )
    assert process.growth() == pytest.approx(0.05)
    assert process.new_descriptors() == 0
    calm = soak.Process("calm", times, [50 + min(t, 20) for t in times], [9] * 10 + [14] * 11)
    assert calm.growth() == 0
    assert calm.new_descriptors() == 5
    outcomes = Counter({"stream: 200": 7, "stream: 500": 1})
    found = soak.Found(1.0, 10.0, 8.0, [process, calm], outcomes, ["a stream is open"])
    assert found.failures() == [
        "grows grew by 5.0%",
        "calm has 5 descriptors more",
        "1 x stream: 500",
        "a stream is open",
    ]
    assert "| grows | 100.0 | 105.0 | +5.00% | 9 | +0 |" in soak.report(found)
    assert soak.plot(found).count("<polyline") == 2


@pytest.mark.ray
@pytest.mark.slow
def test_the_cost_of_the_gateway_is_measured() -> None:
    assert "| HTTP, Serve's proxy | " in gateway_cost.section(quick=True)


def test_being_watched_is_compared_with_the_turns_beside_it() -> None:
    found = {w.name: [0.98, 1.0, 0.99, 0.5] for w in watching.WATCHERS}
    costs_ms = {"/metrics": 4.04}
    text = watching.report({**found, "none": [100.0, 102.0, 101.0]}, costs_ms, watching.Size())
    assert "| none | 101 tokens/s |" in text
    assert "| 4 scrapers, every second | 0.985 | 0.980 to 1.000 | at least 0.99 |" in text
    assert "| /metrics | 4.0 |" in text


@pytest.mark.ray
@pytest.mark.slow
def test_a_served_cluster_is_watched() -> None:
    text = watching.section(quick=True)
    assert all(f"| {watcher.name} | " in text for watcher in watching.WATCHERS)
