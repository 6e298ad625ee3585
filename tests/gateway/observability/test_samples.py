"""The last ten minutes of a gateway, in samples."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.observability.metrics import GatewayMetrics
from gateway.observability.samples import MAX_SAMPLES, PERIOD_S, Sample, SampleRing, merge_samples

SNAPSHOT = {
    "workers": [
        {
            "name": "attention-0",
            "state": "SERVING",
            "kv_blocks_total": 8,
            "kv_usage": 0.25,
            "stats": {"num_requests_waiting": 3},
        },
        {"name": "attention-1", "state": "LOST", "kv_blocks_total": 8, "kv_usage": 0.5},
        {"name": "expert-0", "state": "SERVING", "kv_blocks_total": None},
    ]
}
LOAD = {"balancedness": {"achieved": 0.9, "predicted": 1.0}}


class Counting:
    """A ring that is fed from real metrics."""

    def __init__(self) -> None:
        self.metrics = GatewayMetrics("tiny", lambda: None)
        self.ring = SampleRing()

    def add(self, time_s: float, load: Any = LOAD) -> None:
        self.ring.add(time_s, self.metrics.own_families(), SNAPSHOT, load)


@pytest.fixture
def counting() -> Counting:
    return Counting()


def test_a_sample_counts_from_the_one_before(counting: Counting) -> None:
    engine = counting.metrics.engine("0")
    engine.count("generation_tokens", 100)
    counting.add(1000.0)
    assert counting.ring.after(0.0) == [], "what was before is not of this period"
    engine.count("generation_tokens", 7)
    engine.count("prompt_tokens", 5)
    engine.observe("inter_token_latency_seconds", 0.03)
    engine.observe("inter_token_latency_seconds", 99.0)
    counting.metrics.requests_replayed.labels("moved").inc()
    counting.metrics.requests_replayed.labels("handed_back").inc(2)
    counting.add(1002.5)
    (sample,) = counting.ring.after(0.0)
    assert sample == {
        "time": 1002.0,
        "seconds": 2.5,
        "prompt": 5,
        "output": 7,
        "moved": 1,
        "again": 2,
        "ttft": [],
        "itl": [[0.025, 0.05, 1], [5.0, None, 1]],
        "waiting": {"attention-0": 3},
        "kv": {"attention-0": 0.25},
        "balancedness": LOAD["balancedness"],
    }


def test_the_ring_keeps_ten_minutes(counting: Counting) -> None:
    for index in range(MAX_SAMPLES + 50):
        counting.add(1000.0 + PERIOD_S * index)
    samples = counting.ring.after(0.0)
    assert len(samples) == MAX_SAMPLES
    assert samples[-1]["time"] - samples[0]["time"] == 600.0 - PERIOD_S
    assert counting.ring.after(samples[-2]["time"]) == samples[-1:]


def test_a_period_has_one_sample(counting: Counting) -> None:
    for time_s in (1000.0, 1002.0, 1003.9, 1004.0):
        counting.add(time_s)
    assert [s["time"] for s in counting.ring.after(0.0)] == [1002.0, 1004.0]


def test_a_clock_that_is_set_back_does_not_stop_the_history(counting: Counting) -> None:
    for time_s in (5000.0, 5002.0, 1000.0, 1002.0):
        counting.add(time_s)
    assert [s["time"] for s in counting.ring.after(0.0)] == [1002.0]


def test_a_controller_that_never_answered_leaves_the_gateway_s_counts(counting: Counting) -> None:
    counting.add(1000.0)
    counting.ring.add(1002.0, counting.metrics.own_families(), None, None)
    (sample,) = counting.ring.after(0.0)
    assert (sample["waiting"], sample["balancedness"]) == (
        {},
        {"achieved": None, "predicted": None},
    )


def replica(*outputs: int, start_s: float = 1000.0) -> list[Sample]:
    return [
        {
            "time": start_s + PERIOD_S * i,
            "seconds": 2.0,
            "prompt": 1,
            "output": output,
            "moved": 0,
            "again": 0,
            "ttft": [],
            "itl": [[0.1, 0.2, 1], [5.0, None, 1]],
            "waiting": {"attention-0": 1},
            "kv": {},
            "balancedness": {},
        }
        for i, output in enumerate(outputs)
    ]


def test_counts_of_replicas_add_up() -> None:
    first, second = merge_samples([replica(1, 2, 3), replica(20, start_s=1002.0), []])
    assert (first["output"], second["output"]) == (1, 22)
    assert second["itl"] == [[0.1, 0.2, 2], [5.0, None, 2]]
    assert second["waiting"] == {"attention-0": 1}, "that is the cluster's"
    assert second["seconds"] == 2.0
    assert merge_samples([[], []]) == []
