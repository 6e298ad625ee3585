"""The benchmark of faults: what it takes for a pause, what it says, and that its rows run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks import reliability
from benchmarks.fault_load import FaultLoad, Line
from benchmarks.reliability import QUICK, ROWS, Found, measure, report
from tests.harness.mixed_calls import make_calls
from tests.harness.serving_cluster import connected_ray


def load_with(*calls: list[float]) -> FaultLoad:
    """A load of one client that has seen these calls."""
    nobody: Any = None
    load = FaultLoad(nobody, make_calls(1, 8))
    load.lines = [Line(calls=list(calls))]
    return load


def test_a_pause_lies_within_one_call_and_around_the_fault() -> None:
    load = load_with([1.0, 1.1, 2.0], [9.0, 9.5])
    assert load.longest_pause(1.2) == pytest.approx(0.9)
    assert load.longest_pause(0.0, 1.05) == pytest.approx(0.1)
    assert load.longest_pause(2.0) == pytest.approx(0.5)
    assert load.longest_pause(9.5) == 0.0


def test_the_report_has_a_line_for_each_row_that_was_run() -> None:
    found = {
        "attention": Found(stalls_s=[0.2, 0.4, 0.3], calm_s=[0.1, 0.1, 0.2], failures=["x"]),
        "two-experts": Found(stalls_s=[], calm_s=[], failures=[], note="TimeoutError: no"),
    }
    lines = report(found).splitlines()
    assert len(lines) == 4
    assert lines[2].endswith("| worst 3 s | - | - | - | 0 (TimeoutError: no) | 0 |")
    assert lines[3].endswith("| 0.5 / 2 s | 0.30 | 0.40 | 0.10 | 3 | 1 |")


def test_rows_have_names_of_their_own() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_an_unknown_row_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reliability.main(["--rows", "attention,nothing"])
    assert "nothing is not one of" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_runs_and_no_call_fails(row: reliability.Row) -> None:
    with connected_ray():
        found = measure(row, replace(QUICK, repetitions=2))
    assert (len(found.stalls_s), found.failures) == (2, []), found.note
