"""Steps that are wanted and do not come are noticed, whatever keeps them away."""

from __future__ import annotations

import os
import subprocess
import sys

NUM_SEEDS = 2


def test_requests_end_although_a_leader_loses_proposals() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation.lost_proposals", str(NUM_SEEDS)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
