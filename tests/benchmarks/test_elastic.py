"""The benchmarks of a cluster that changes while it serves run, and find nothing wrong."""

from __future__ import annotations

import re

import pytest

from benchmarks.faults import moves
from benchmarks.serving import overload
from tests.long import chaos

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_short_chaos_harms_no_client(capsys: pytest.CaptureFixture[str]) -> None:
    code = chaos.main(["--seed", "3", "--minutes", "0.7", "--every", "4"])
    printed = capsys.readouterr().out
    assert code == 0, printed
    assert "tokens: 0 lost, 0 altered, 0 duplicated; left: nothing." in printed


def test_pauses_of_moves_are_measured() -> None:
    text = moves.section(quick=True)
    assert text.startswith("## Moved requests")
    assert "KV fetched: median before" in text


def test_overload_is_measured() -> None:
    text = overload.section(quick=True)
    assert "10 times sustainable rate" in text
    (probes,) = re.findall(r"^\| probes beside the sustainable rate, before \|.*$", text, re.M)
    assert probes.split(" | ")[-2] != "nan", "single requests get their first tokens"
