"""Sums of a load test."""

from __future__ import annotations

import pickle

import pytest

from cluster.workload.tally import CompletedRequest, Distribution, Tally


def test_quantiles_to_half_a_percent() -> None:
    found = Distribution()
    for value in range(1, 1001):
        found.add(float(value))
    summary = found.summary()
    assert summary["mean"] == 500.5
    assert summary["median"] == pytest.approx(500, rel=0.006)
    assert summary["p99"] == pytest.approx(990, rel=0.006)
    assert summary["p90"] == pytest.approx(900, rel=0.006)
    assert set(Distribution().summary().values()) == {None}


def test_memory_does_not_grow_with_the_load() -> None:
    found = Distribution()
    for number in range(20_000):
        found.add(1e-3 + number)
    assert found.count == 20_000
    assert len(pickle.dumps(found)) < 20_000


def test_measures_of_an_answer() -> None:
    answer = CompletedRequest([0.5, 0.75, 1.5], 1.75, prompt_tokens=3, output_tokens=5)
    assert answer.measures_ms() == {
        "ttft": [500.0],
        "tpot": [250.0],
        "itl": [250.0, 750.0],
        "e2e": [1750.0],
    }
    assert CompletedRequest([0.5], 0.5, 3, 1).measures_ms()["tpot"] == []


@pytest.mark.parametrize(
    ("goals", "good"),
    [({"itl": 800.0}, 1), ({"itl": 700.0}, 0), ({"ttft": 500.0, "e2e": 1000.0}, 0)],
)
def test_goodput_looks_at_the_longest_gap(goals: dict[str, float], good: int) -> None:
    tally = Tally(goals)
    tally.begin()
    tally.take(CompletedRequest([0.5, 0.75, 1.5], 1.75, prompt_tokens=3, output_tokens=5))
    assert tally.results(2.0)["good_requests_per_s"] == good / 2


def test_every_request_is_counted_once() -> None:
    tally = Tally({})
    for _ in range(3):
        tally.begin()
    tally.take(CompletedRequest([0.1, 0.2], 0.2, prompt_tokens=3, output_tokens=2))
    tally.fail("429 queue_full")
    results = tally.results(4.0)
    assert (results["successful"], results["failed"], results["unfinished"]) == (1, 1, 1)
    assert results["failures"] == {"429 queue_full": 1}
    assert (results["peak_concurrency"], tally.ended) == (3, 2)
    assert (results["output_tokens_per_s"], results["tokens_per_s"]) == (0.5, 1.25)
    assert results["good_requests_per_s"] is None


def test_the_time_after_an_arrival_is_counted() -> None:
    tally = Tally({})
    tally.begin(0.25)
    assert tally.results(2.0)["sent_late_ms"]["mean"] == 250.0
