"""The pure parts of the benchmark of scaling."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.faults import scaling
from benchmarks.faults.load import Line, Load
from benchmarks.faults.scaling import Scaled, calls, gaps, longest_change, report


def scaled(pause_s: float, step_s: float = 0.01) -> Scaled:
    return Scaled(step_s=step_s, before_s=0.02, pause_s=pause_s, change_s=0.008, took_s=6.0)


def test_gaps_are_those_of_one_call_that_end_in_the_time() -> None:
    load = Load(2)
    load.lines[:] = [Line([[1.0, 2.0, 4.0], [9.0]]), Line([[3.0, 3.5]])]
    assert list(gaps(load, 0.0, 10.0)) == [1.0, 2.0, 0.5]
    assert list(gaps(load, 3.0, 4.0)) == [0.5]


def test_the_longest_change_is_one_after_the_order() -> None:
    history: list[dict[str, Any]] = [
        {"generation": 2, "took_s": 9.0},
        {"generation": 3, "took_s": 0.02},
        {"generation": 4, "took_s": None},
    ]
    assert longest_change(history, 2) == 0.02
    assert longest_change(history, 4) == 0.0


def test_a_row_has_medians_and_the_worst() -> None:
    text = report({(4, "up"): [scaled(0.02), scaled(0.03), scaled(0.6)]})
    row = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert row == [
        *("4", "1 + 2 to 2 + 3", "10.0", "20 / 20", "30 / 600"),
        *("3.0", "8 / 8", "6.0", "1 of 3"),
    ]


def test_each_stream_has_a_prompt_of_its_own() -> None:
    made = calls(3, 50)
    assert len({call.prompts for call in made}) == 3
    assert {call.max_tokens for call in made} == {50}


@pytest.mark.ray
@pytest.mark.slow
def test_pauses_of_scalings_are_measured() -> None:
    text = scaling.section(quick=True)
    assert text.startswith("## Scaling")
    assert "2 + 3 to 1 + 2" in text
