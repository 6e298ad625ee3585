"""Some seeds of the simulation, in a process whose sets have the same order every time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

NUM_SEEDS = 12
"""Seeds of each part."""


@pytest.mark.parametrize("part", range(2))
def test_seeds_keep_every_promise(part: int) -> None:
    first = part * NUM_SEEDS
    command = [sys.executable, "-m", "tests.simulation"]
    found = subprocess.run(
        [*command, "--seed", str(first), "--num", str(NUM_SEEDS)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )
    assert found.returncode == 0, found.stdout + found.stderr
