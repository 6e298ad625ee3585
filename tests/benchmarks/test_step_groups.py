"""The benchmark of step groups runs: paced workers serve streams beside prompts."""

from __future__ import annotations

import json

import pytest

from benchmarks.simulated import step_groups


def test_layouts_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert step_groups.main(["--lengths", "40", "--prompts", "1", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["layout"] for row in rows] == [*step_groups.LAYOUTS]
    for row in rows:
        assert row["prompt_tokens"] == 40
        assert row["alone_ms"] > 0
        assert row["second_ms"] > 0
