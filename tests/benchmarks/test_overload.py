"""The benchmark of overload: when latency counts as normal, and what the report says."""

from __future__ import annotations

import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.rpc import error_details_pb2, status_pb2

from benchmarks.serving.overload import Found, normal_after, report
from benchmarks.serving.overload_load import GREEDY, MODEST, Phase, Refusal, retry_of


def phase(name: str, num_tokens: int, ttft_ms: float, key: str = GREEDY) -> Phase:
    """Ten seconds."""
    made = Phase(name, 0.0, 10.0, num_tokens=num_tokens)
    made.ttft_ms[key].append((11.0, ttft_ms))
    made.statuses["200"] = 1
    return made


def test_latency_is_normal_again_from_the_first_window_with_a_normal_median() -> None:
    after = [(0.1, 900.0), (0.9, 500.0), (1.8, 60.0), (2.0, 200.0), (2.1, 55.0), (2.4, 50.0)]
    assert normal_after(50.0, after) == pytest.approx(1.8)
    assert normal_after(10.0, after) is None


def test_a_retry_time_is_found_among_the_details() -> None:
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(2500)
    status = status_pb2.Status()
    for detail in (error_details_pb2.ErrorInfo(reason="queue_wait"), retry):
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    assert retry_of(status.SerializeToString()) == pytest.approx(2.5)
    assert retry_of(status_pb2.Status().SerializeToString()) is None


def test_the_report_has_a_limit_beside_each_number() -> None:
    over = phase("over", 980, 80.0)
    over.statuses["429"] = 3
    over.refusals = [Refusal(GREEDY, 1.0, ms, 2.0) for ms in (10.0, 20.0, 90.0)]
    found = Found(
        peak=phase("peak", 1010, 60.0),
        peak_after=phase("peak", 990, 60.0),
        before=phase("before", 1, 50.0),
        over=over,
        after=phase("after", 1, 70.0),
        beside=[phase("", 1, ms, MODEST) for ms in (40.0, 45.0, 50.0, 54.0)],
        mean_tokens=256,
        retries=["200", "429"],
        most_waiting=30,
        grown=[],
    )
    text = report(found)
    assert "| tokens/s, percent of the peak | at least 95% | 98% |" in text
    assert "| time to a rejection, median | under 50 ms | 20 ms |" in text
    assert "| accepted when sent again, of the last 2 rejected requests |  | 1 |" in text
    assert "| TTFT is normal again after | 5 s | 1.0 s |" in text
    for share, ratio in (("0.3", "1.35"), ("0.4", "1.20"), ("0.7", "1.08")):
        row = (
            "| modest's TTFT with greedy at 7.0 of the peak, divided by its TTFT with greedy at "
            f"{share} | at most 1.5 "
        )
        assert f"{row}| {ratio} |" in text
