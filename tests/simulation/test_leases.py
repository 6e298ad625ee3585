"""Idle workers: who is cut off stops within its lease, nobody else does, and Ray ends holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys

LEASE_S = 3.6
NODE_LIMIT_S = 6.0
WORD_S = 1.0
"""Time in which the controller learns that nodes are dead, and judges their workers."""
SLACK_S = 0.6
"""Time after the lease until the heartbeat that checks it, seconds."""


def test_leases_end_when_they_must() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation.leases"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for seconds in found["fenced_after_s"]:
        assert LEASE_S - SLACK_S < seconds < LEASE_S + SLACK_S
    assert found["run_without_controller"] == [True, True, True]
    lost_after_s, num_living, num_left, serves = found["ends_of_a_hold"]
    assert NODE_LIMIT_S < lost_after_s < NODE_LIMIT_S + WORD_S
    assert (num_living, num_left, serves) == (4, 0, True)
