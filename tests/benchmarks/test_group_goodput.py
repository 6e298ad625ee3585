"""The benchmark of goodput runs: layouts serve a trace in virtual time."""

from __future__ import annotations

import json

import pytest

from benchmarks.simulated import group_goodput


def test_layouts_are_compared(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_goodput, "SIZES", ((1, 1, 2),))
    monkeypatch.setattr(group_goodput, "GOALS", ({"ttft": 60000.0, "tpot": 1000.0},))
    assert group_goodput.main(["--requests", "8", "--json"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["workers"] == "1 + 1 + 2"
    assert row["one_group"] > 0
    assert row["shared"] > 0
    assert row["own"] > 0
    assert row["auto"] in ("shared", "own")
