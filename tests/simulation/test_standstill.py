"""Readiness falls in 2 s when a worker keeps steps waiting, and not while it computes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

NUM_SEEDS = 4


@pytest.mark.slow
def test_readiness_falls_with_a_worker_that_stands_still_and_names_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.simulation.standstill", str(NUM_SEEDS)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
