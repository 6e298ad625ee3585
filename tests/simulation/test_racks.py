"""The loss of half of the expert workers costs no expert, and rebalancing spreads copies again."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.heavy


def test_the_loss_of_a_rack_costs_no_expert() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation.racks"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["loss"] == {
        "problem": "",
        "num_lost": 4,
        "was_covered": True,
        "num_writes": 0,
        "num_replays": 0,
        "num_failed": 0,
    }
    assert found["return"]["problem"] == ""
    at_risk = found["return"]["at_risk"]
    assert max(at_risk) == 16  # the new workers of the rack hold no second copies
    assert at_risk[-1] == 0
