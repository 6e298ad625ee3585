"""Sums over time."""

from __future__ import annotations

import pytest

from cluster.cli.bench.timeline import MAX_BINS, Timeline


def test_bins_widen_and_lose_nothing() -> None:
    timeline = Timeline()
    times = [0.1 * n for n in range(5000)]
    for at_s in times:
        timeline.add_tokens(at_s, 2.0)
        timeline.add_end(at_s)
        timeline.add_first(at_s, 7.0)
    series = timeline.series()
    assert series["bin_s"] * MAX_BINS > times[-1] >= series["bin_s"] * MAX_BINS / 2
    assert len(series["ttft_ms"]) <= MAX_BINS
    assert sum(series["output_tokens_per_s"]) * series["bin_s"] == pytest.approx(2.0 * 5000)
    assert sum(series["requests_per_s"]) * series["bin_s"] == pytest.approx(5000)
    assert series["ttft_ms"] == pytest.approx([7.0] * len(series["ttft_ms"]))


def test_a_bin_without_a_request_has_no_time() -> None:
    timeline = Timeline()
    timeline.add_first(0.0, 3.0)
    timeline.add_tokens(0.6, 1.0)
    assert timeline.series()["ttft_ms"] == [3.0, None, None]
