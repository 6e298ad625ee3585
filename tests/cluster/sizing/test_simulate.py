"""Traces on paper: what each policy moves, and what a step takes, against sums done by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cluster.cli.main import main
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.core.errors import ConfigError
from cluster.core.load_profile import LoadProfile
from cluster.planner.base import Floats, PlannedDevice, PlannedTopology
from cluster.sizing.replay import POLICIES, ExpertStepCost, load_trace, simulate
from tests.cluster.planner.planner_cases import make_profile

TOPOLOGY = PlannedTopology.uniform(4, num_redundant=1)


def loads(seed: int) -> Floats:
    return np.asarray(np.exp(np.random.default_rng(seed).normal(size=(2, 16))))


def shifting(windows: int) -> list[LoadProfile]:
    """From one load to another, a part each window."""
    first, last = loads(0), loads(1)
    return [make_profile(last + (first - last) * 0.6**i, top_k=4) for i in range(windows)]


def test_a_window_runs_what_was_planned_from_the_one_before() -> None:
    same = [make_profile(loads(0), 4)] * 3
    for window in simulate(same, TOPOLOGY, "mesh", ExpertStepCost()):
        assert window.balancedness > 0.99
        assert window.slots_moved == 0
    changed = [same[0], make_profile(loads(1), 4), make_profile(loads(1), 4)]
    first, second = simulate(changed, TOPOLOGY, "mesh", ExpertStepCost(), max_move_fraction=1.0)
    assert first.balancedness < 0.9
    assert first.slots_moved == 0
    assert second.balancedness > 0.98
    assert second.slots_moved > 0


def test_policies_move_nothing_little_and_nearly_everything() -> None:
    trace = shifting(6)
    found = {
        p: simulate(trace, TOPOLOGY, p, ExpertStepCost(expert_bytes=10), 0.1) for p in POLICIES
    }
    moved = {p: [w.slots_moved for w in windows] for p, windows in found.items()}
    assert moved["never"] == [0] * 5
    assert all(n <= 0.1 * 2 * 20 for n in moved["mesh"])
    assert 0 < sum(moved["mesh"]) < sum(moved["eplb"]) / 3
    last = {p: windows[-1] for p, windows in found.items()}
    assert last["mesh"].balancedness > last["never"].balancedness
    assert last["mesh"].prefill_step_s < last["never"].prefill_step_s
    assert last["eplb"].bytes_moved == 10 * moved["eplb"][-1]


def test_a_step_takes_what_the_slowest_device_takes() -> None:
    """Two devices with one expert each: 0.75 and 0.25 of 100 tokens, top-1."""
    profile = make_profile(np.array([[3.0, 1.0]]), top_k=1)
    topology = PlannedTopology(devices=(PlannedDevice(num_expert_slots=1),) * 2)
    step = ExpertStepCost(slot_s=1.0, token_s=0.01, prefill_tokens=100, decode_tokens=1)
    (window,) = simulate([profile] * 2, topology, "never", step)
    assert window.prefill_step_s == pytest.approx(1.0 + 0.75)
    assert window.decode_step_s == pytest.approx(1 - 0.25 * 0.75 + 0.0075)
    assert window.balancedness == pytest.approx(0.5 / 0.75)


def test_a_faster_device_takes_less() -> None:
    profile = make_profile(np.array([[3.0, 1.0]]), top_k=1)
    devices = tuple(PlannedDevice(num_expert_slots=1, speed=s) for s in (3.0, 1.0))
    step = ExpertStepCost(slot_s=0.0, token_s=0.01, prefill_tokens=100)
    topology = PlannedTopology(devices=devices)
    (window,) = simulate([profile] * 2, topology, "never", step)
    assert window.balancedness == pytest.approx(1.0)
    assert window.prefill_step_s == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ([make_profile(loads(0), 4)], "at least 2 windows"),
        ([make_profile(loads(0), 4), make_profile(loads(0), 2)], "of one model"),
    ],
)
def test_traces_that_cannot_be_replayed_are_refused(trace: list[LoadProfile], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        simulate(trace, TOPOLOGY, "mesh", ExpertStepCost())


def test_costs_are_checked() -> None:
    with pytest.raises(ConfigError, match="slot_s"):
        ExpertStepCost(slot_s=-1.0)
    with pytest.raises(ConfigError, match="decode_tokens"):
        ExpertStepCost(decode_tokens=0)


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(p.to_dict()) + "\n" for p in shifting(4)))
    return path


def test_the_command_compares_policies(
    trace_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load_trace(trace_file) == shifting(4)
    command = ["plan", "simulate", "--trace", str(trace_file), "--devices", "4"]
    assert main([*command, "--json"]) == ExitCode.OK
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    assert list(found["policies"]) == ["never", "eplb", "mesh"]
    assert {len(windows) for windows in found["policies"].values()} == {3}
    assert set(found["policies"]["mesh"][0]) == {
        "balancedness",
        "prefill_step_s",
        "decode_step_s",
        "slots_moved",
        "bytes_moved",
    }
    assert main([*command, "--policy", "mesh"]) == ExitCode.OK
    text = capsys.readouterr().out
    head = ["WINDOW", "POLICY", "BALANCEDNESS", "PREFILL", "MS", "DECODE", "MS", "SLOTS"]
    assert text.split()[:8] == head
    assert text.splitlines()[1].split()[:2] == ["1", "mesh"]
    assert "eplb" not in text


@pytest.mark.parametrize("line", ["{}", "[" * 100_000])
def test_a_wrong_line_is_named(
    line: str, trace_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace_file.write_text(f"{trace_file.read_text()}{line}\n")
    command = ["plan", "simulate", "--trace", str(trace_file), "--devices", "4"]
    assert main(command) == ExitCode.USAGE
    assert "line 5 is not a load profile" in capsys.readouterr().err
