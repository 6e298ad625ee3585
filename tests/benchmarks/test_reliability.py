"""The benchmark of faults: what it takes for a pause, what it says, and that its rows run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.faults.load import FaultLoad, Line
from benchmarks.harness.mixed_calls import make_calls
from benchmarks.harness.serving_cluster import connected_ray
from tests.long import reliability, reliability_hosts
from tests.long.reliability import QUICK, measure
from tests.long.reliability_report import Found, lost, page_rows, report
from tests.long.reliability_rows import ROWS, Row


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
        "attention": Found(
            stalls_s=[0.2, 0.4, 0.3], calm_s=[0.1, 0.1, 0.2], failures=["x"], num_lost=[1, 1, 2]
        ),
        "two-experts": Found(note="TimeoutError: no"),
    }
    lines = report(ROWS, found).splitlines()
    assert len(lines) == 4
    assert lines[2].endswith("| worst 3 s | - | - | - | - | 0 (TimeoutError: no) | 0 |")
    assert lines[3].endswith("| 0.5 / 2 s | 0.30 | 0.40 | 0.10 | 1-2 | 3 | 1 |")
    (row,) = page_rows(ROWS, found).splitlines()
    assert row == "| `kill -9` an attention worker (2 + 2) | 0.5 / 2 s | 0.30 / 0.40 s |"


def test_rows_have_names_of_their_own() -> None:
    names = [row.name for row in (*ROWS, *reliability_hosts.ROWS)]
    assert len(set(names)) == len(names)


def test_workers_that_never_served_do_not_count_as_lost() -> None:
    def snapshot(**states: str) -> dict[str, Any]:
        return {"workers": [{"name": n, "state": state} for n, state in states.items()]}

    before = snapshot(a="SERVING", b="SERVING", c="SERVING", d="LOST", e="LOADING")
    after = snapshot(a="SERVING", b="LOST", c="DRAINED", d="LOST", e="LOST", f="LOST")
    assert lost(before, after) == ["b", "c"]


def test_an_unknown_row_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        reliability.main(["--rows", "attention,nothing"])
    assert "nothing is not one of" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        reliability_hosts.main(["--rows", "nothing"])
    assert "nothing is not one of" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_every_row_runs_and_no_call_fails(row: Row) -> None:
    with connected_ray():
        found = measure(row, replace(QUICK, repetitions=2))
    assert (len(found.stalls_s), found.failures) == (2, []), found.note


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("row", reliability_hosts.ROWS, ids=lambda row: row.name)
def test_every_row_of_hosts_runs(row: reliability_hosts.HostRow) -> None:
    size = reliability_hosts.Size(num_streams=4, repetitions=1)
    found = reliability_hosts.measure_all([row], size)[row.name]
    assert (len(found.stalls_s), found.failures) == (1, []), found.note
