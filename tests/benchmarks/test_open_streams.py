"""The benchmark of open streams: its arithmetic, and a small run."""

from __future__ import annotations

import pytest

from benchmarks.engine import open_streams


def test_latency_is_that_of_the_step_of_each_token() -> None:
    received = [(0, 1.1), (1, 1.2), (2, 2.1), (0, 2.2)]
    found = open_streams._added_s(received, 3, 2, [1.0, 2.0])
    assert found == pytest.approx([0.1, 0.2, 0.1, 0.2])


@pytest.mark.parametrize("received", [[(0, 1.1)], [(0, 1.1), (0, 1.2)]])
def test_a_token_that_did_not_come_is_an_error(received: list[tuple[int, float]]) -> None:
    with pytest.raises((RuntimeError, IndexError)):
        open_streams._added_s(received, 2, 2, [1.0])


@pytest.mark.slow
@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_few_streams_are_measured(protocol: open_streams.Protocol) -> None:
    row = open_streams.measure(protocol, 20, num_gateways=2, tokens_per_s=500)
    assert row.what == f"open streams over {protocol}"
    assert row.us > 0
    assert row.added_p99_ms >= row.added_p50_ms > 0
