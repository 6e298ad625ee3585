from __future__ import annotations

import pytest

from benchmarks.faults.layouts import DETECTION_LIMIT_S, row_config
from benchmarks.harness.cluster_gateway import Answer
from tests.harness.fault_rows import calm_limit_s, check_stall, longest_gap


def test_rows_detect_as_fast_as_the_product() -> None:
    assert row_config(1, 1).transport.detection_limit_s == DETECTION_LIMIT_S == 2.0


def test_a_recovery_of_30_seconds_fails() -> None:
    check_stall(4.0, 0.0, row_config(1, 1))
    with pytest.raises(AssertionError, match=r"stood still for 30\.0 s, and the machine for 4\.0"):
        check_stall(30.0, 4.0, row_config(1, 1))
    check_stall(30.0, 20.0, row_config(1, 1))


@pytest.mark.parametrize(
    ("patience", "expected"),
    [
        ([0.3, 0.4], 0.2),
        ([0.9, 0.5, None], 0.4),
        ([1.7], 1.5),  # the loop has 2 s, and a heartbeat comes every 0.5 s
        ([None], 1.5),
        ([], 1.5),
    ],
)
def test_a_calm_machine_pauses_for_less_than_what_its_workers_may(
    patience: list[float | None], expected: float
) -> None:
    workers = [{"state": "SERVING", "patience_s": each} for each in patience]
    workers.append({"state": "LOST", "patience_s": 0.3})
    transport = row_config(1, 1).transport
    assert calm_limit_s({"workers": workers}, transport) == pytest.approx(expected)


def test_the_longest_gap_begins_after_the_fault() -> None:
    early, late = Answer(times=[1.0, 9.0]), Answer(times=[2.0, 11.0, 14.0])
    first = Answer(times=[15.5])
    assert longest_gap([early, late], 10.0) == 3.0
    assert longest_gap([early, late, first], 10.0) == 5.5
    assert longest_gap([early], 10.0) == 0.0
