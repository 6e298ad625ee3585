"""Laps of steps as histograms: which steps, which phase, what a bubble is."""

from __future__ import annotations

from workers.metrics.step_metrics import BUCKETS, SAMPLE_INTERVAL, StepMetrics
from workers.requests.step_header import Grant, Grants, StepHeader

MS = 1_000_000


def header_of(step: int, prefill_rows: int = 0) -> StepHeader:
    return StepHeader(
        generation=1,
        step=step,
        epoch=0,
        oldest_epoch=0,
        grants=Grants.of({0: Grant(decode_rows=1, prefill_rows=prefill_rows)}),
    )


def measure(metrics: StepMetrics, header: StepHeader, *laps: tuple[str, int]) -> bool:
    """One step with laps of these lengths in milliseconds."""
    wanted = metrics.begin_step(header)
    if wanted:
        for name, length in laps:
            metrics.add(name, 0, length * MS, {})
        metrics.flush()
    return wanted


def test_one_step_in_several_is_measured() -> None:
    metrics = StepMetrics("combine")
    wanted = [measure(metrics, header_of(step)) for step in range(2 * SAMPLE_INTERVAL)]
    assert [step for step, is_wanted in enumerate(wanted) if is_wanted] == [0, SAMPLE_INTERVAL]


def test_spans_are_counted_by_phase() -> None:
    metrics = StepMetrics("combine")
    assert metrics.stats() == {}
    measure(metrics, header_of(0), ("attention", 2), ("dispatch", 1), ("combine", 4))
    measure(
        metrics, header_of(SAMPLE_INTERVAL, 5), ("attention", 20), ("sample", 7), ("combine", 40)
    )
    stats = metrics.stats()
    assert stats['attention_compute_seconds_sum{phase="decode"}'] == 0.002
    assert stats['attention_compute_seconds_sum{phase="prefill"}'] == 0.02
    assert stats['dispatch_seconds_count{phase="decode"}'] == 1
    assert stats['combine_seconds_bucket{phase="prefill",le="0.03"}'] == 0
    assert stats['combine_seconds_bucket{phase="prefill",le="0.1"}'] == 1
    assert len([key for key in stats if key.startswith("combine_seconds_bucket")]) == 2 * (
        len(BUCKETS) + 1
    )


def test_a_step_s_waits_are_its_bubble() -> None:
    metrics = StepMetrics("receive")
    measure(metrics, header_of(0), ("receive", 2), ("experts", 5), ("receive", 3))
    stats = metrics.stats()
    assert stats['bubble_seconds_sum{phase="decode"}'] == 0.005
    assert stats['bubble_seconds_count{phase="decode"}'] == 1
    assert stats['expert_compute_seconds_count{phase="decode"}'] == 1


def test_waits_of_one_bank_stand_for_those_of_all() -> None:
    metrics = StepMetrics("receive")
    metrics.begin_step(header_of(0))
    metrics.add("receive", 0, 2 * MS, {"num_banks": 16})
    metrics.flush()
    assert metrics.stats()['bubble_seconds_sum{phase="decode"}'] == 0.032
