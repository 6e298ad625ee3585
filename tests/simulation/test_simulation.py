"""Some seeds of the simulation, in a process whose sets have the same order every time."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.harness.tiers import quick_rows
from tests.simulation.bugs import BUGS
from tests.simulation.coverage import OCCURRENCES
from tests.simulation.hand_over_kills import PHASES, VICTIMS

pytestmark = pytest.mark.heavy

PARTS = (range(23, 27), range(12), range(12, 27))
"""Seeds, of which each part has every feature."""
MANY = range(1000, 1500, 100)
"""The first seeds of five hundreds."""
QUICK_BUGS = {"half_restore", "kept_slots", "kept_stream"}
WITH_DISKS = 2
"""A seed whose gateways store objects, and whose workers keep blocks on disk."""


def run(*options: str) -> subprocess.CompletedProcess[str]:
    """The simulation's command."""
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", *options],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": "0"},
    )


@pytest.mark.parametrize("part", quick_rows(PARTS[:1], PARTS), ids=str)
def test_seeds_keep_every_promise_and_use_every_feature(part: range) -> None:
    found = run("--seed", str(part[0]), "--num", str(len(part)))
    assert found.returncode == 0, found.stdout + found.stderr
    _, _, counted = found.stdout.strip().rpartition("features: ")
    counts = {name: int(n) for n, _, name in (c.partition(" ") for c in counted.split(", "))}
    missing = [name for name in OCCURRENCES if not counts.get(name)]
    assert not missing, f"nothing of {missing} in {counted}"


@pytest.mark.parametrize(
    ("members", "num"), [("10+4", 1), pytest.param("12+6", 40, marks=pytest.mark.slow)]
)
def test_seeds_of_a_cluster_with_a_second_hop(members: str, num: int) -> None:
    found = run("--members", members, "--num", str(num), "--jobs", "2")
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.slow
def test_seeds_of_many_members(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMULATED_EXPERTS", "64")
    found = run("--members", "32+32", "--num", "4", "--jobs", "2")
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.slow
def test_a_seed_with_disks_is_the_same_twice() -> None:
    found = [run("--seed", str(WITH_DISKS)).stdout.splitlines() for _ in range(2)]
    first, second = (lines[1:] for lines in found)  # the line before has the CPU time
    assert first == second
    assert "objects read" in first[-1], first
    assert "tokens restored from disk" in first[-1], first


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("first", MANY)
def test_many_seeds_keep_every_promise(first: int) -> None:
    jobs = str(len(os.sched_getaffinity(0)))
    found = run("--seed", str(first), "--num", "100", "--jobs", jobs)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.distributed
@pytest.mark.slow
def test_kills_in_every_phase_of_a_hand_over() -> None:
    jobs = str(len(os.sched_getaffinity(0)))
    options = ("--kinds", "kill_in_hand_over", "--features", "groups", "--num", "200")
    found = run(*options, "--jobs", jobs)
    assert found.returncode == 0, found.stdout + found.stderr
    missing = [
        f"{victim} killed: {phase}"
        for victim in VICTIMS
        for phase in PHASES
        if f" {victim} killed: {phase}" not in found.stdout
    ]
    assert not missing, found.stdout


@pytest.mark.distributed
@pytest.mark.parametrize("bug", quick_rows(QUICK_BUGS, BUGS))
def test_a_planted_bug_is_found(bug: str) -> None:
    found = run("--bug", bug)
    assert found.returncode == 0, f"{bug} is not found: {found.stdout}{found.stderr}"
