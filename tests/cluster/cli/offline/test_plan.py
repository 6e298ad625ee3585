"""``plan``: files in, plans and pages out, no cluster."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.cli.main import main
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.core.load_profile import LoadProfile
from cluster.core.placement import BankShape
from cluster.core.placement_file import load_placement
from tests.cluster.cli.exits import exit_code
from tests.cluster.planner.planner_cases import make_profile

SHAPES = [BankShape(bank="mlp", layer=layer, num_experts=16) for layer in range(2)]


def skewed(seed: int) -> LoadProfile:
    return make_profile(np.exp(np.random.default_rng(seed).normal(size=(2, 16))), top_k=4)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(skewed(0).to_dict()))
    return path


@pytest.fixture
def later(tmp_path: Path) -> Path:
    path = tmp_path / "later.json"
    path.write_text(json.dumps(skewed(1).to_dict()))
    return path


def document(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["--json", "plan", "placement", *map(str, arguments)]) == ExitCode.OK
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_document_is_a_placement_file(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = document(capsys, "--profile", profile, "--devices", 4, "--redundant", 1)
    assert found["schema"] == 1
    assert found["predicted"]["balancedness"]["min"] > 0.97
    assert found["moves"] == []
    file = tmp_path / "placement.json"
    file.write_text(json.dumps(found))
    placement = load_placement(file, SHAPES, 4)
    assert [len(slots) for slots in placement.banks[0].physical_to_logical] == [5] * 4


def test_profiles_are_added_up(
    profile: Path, later: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--devices", 4, "--redundant", 1)
    sum_of_both = tmp_path / "sum.json"
    sum_of_both.write_text(json.dumps(skewed(0).merge(skewed(1)).to_dict()))
    added = document(capsys, "--profile", profile, "--profile", later, *options)
    assert added == document(capsys, "--profile", sum_of_both, *options)
    assert added["banks"] != document(capsys, "--profile", profile, *options)["banks"]


def test_a_plan_starts_from_what_is_placed_and_keeps_its_budget(
    profile: Path, later: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    devices = ("--devices", 4, "--redundant", 1)
    current = tmp_path / "current.json"
    current.write_text(json.dumps(document(capsys, "--profile", profile, *devices)))
    arguments = ("--profile", later, *devices, "--current", current)
    found = document(capsys, *arguments, "--max-move-fraction", 0.1, "--compare")
    assert 0 < len(found["moves"]) <= 4
    assert found["epoch"] == 2
    assert list(found["compare"]) == ["current", "contiguous", "eplb", "mesh"]
    balance = {name: c["balancedness"]["mean"] for name, c in found["compare"].items()}
    assert balance["mesh"] > balance["current"]
    assert found["compare"]["mesh"]["move_fraction"] <= 0.1


def test_a_faster_device_gets_more_load(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--profile", profile, "--devices", 3, "--redundant", 2, "--speeds", "1,1,2")
    found = document(capsys, *arguments)
    counts = skewed(0).banks[0].counts
    taken = [
        sum(share * counts[e] for e, share in zip(slots, split, strict=True) if e >= 0)
        for slots, split in zip(
            found["banks"][0]["physical_to_logical"], found["banks"][0]["split"], strict=True
        )
    ]
    assert taken[2] == pytest.approx(sum(counts) / 2, rel=0.02)


def test_people_get_a_table(profile: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "placement", "--profile", str(profile), "--devices", "4", "--compare"]
    assert main(arguments) == ExitCode.OK
    found = capsys.readouterr()
    assert "2 expert banks on 4 devices" in found.err
    names = [line.split()[0] for line in found.out.splitlines()[1:4]]
    assert names == ["contiguous", "eplb", "mesh"]
    assert "1 is ideal" in found.out


def test_the_page_needs_nothing_else_and_holds_both_placements(
    profile: Path, later: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    current, page = tmp_path / "current.json", tmp_path / "page.html"
    devices = ("--devices", 4, "--redundant", 1)
    current.write_text(json.dumps(document(capsys, "--profile", profile, *devices)))
    found = document(capsys, "--profile", later, *devices, "--current", current, "--plot", page)
    text = page.read_text()
    assert not re.search(r"(src|href)=|https?:|@import|\{\{", text)
    data = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
    assert data["names"] == ["current", "mesh"]
    assert data["moves"] == found["moves"] != []
    for bank, planned in zip(data["banks"], found["banks"], strict=True):
        after = [[copy[0] for copy in copies] for copies in bank["copies"][1]]
        assert after == [[e for e in slots if e >= 0] for slots in planned["physical_to_logical"]]
        assert sum(bank["load"]) == pytest.approx(1.0, abs=1e-5)


def test_names_cannot_break_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile, page = tmp_path / "profile.json", tmp_path / "page.html"
    named = json.dumps({**skewed(0).to_dict(), "model": "</script><b>"})
    profile.write_text(named)
    document(capsys, "--profile", profile, "--devices", 2, "--plot", page)
    assert "<b>" not in page.read_text().split("<body>")[1].split("<p")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "0"], "--devices: '0' must be a whole number from 1"),
        (["--devices", "2", "--nodes", "3"], "--nodes (3) must"),
        (
            ["--devices", "2", "--redundant", "-1"],
            "--redundant: '-1' must be a whole",
        ),
        (["--devices", "2", "--speeds", "1,2,3"], "--speeds (3) must be one for each of the 2"),
        (
            ["--devices", "2", "--speeds", "1,0"],
            "--speeds: '1,0' must be numbers above 0",
        ),
        (["--devices", "2", "--max-move-fraction", "0.1"], "(0.1) needs --current"),
        (["--devices", "2", "--current", "missing.json"], "missing.json"),
        (["--devices", "2", "--decode-tokens", "0"], "--decode-tokens: '0' must be"),
        (
            ["--devices", "2", "--profile", "missing.json"],
            "--profile (missing.json) cannot",
        ),
    ],
)
def test_wrong_options_are_named(
    profile: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("plan", "placement", "--profile", str(profile), *arguments) == ExitCode.USAGE
    assert message in capsys.readouterr().err


def test_only_mesh_keeps_a_budget(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    current = tmp_path / "current.json"
    current.write_text(json.dumps(document(capsys, "--profile", profile, "--devices", 2)))
    command = ["plan", "placement", "--profile", str(profile), "--devices", "2"]
    command += ["--current", str(current), "--max-move-fraction", "0.1", "--algorithm", "eplb"]
    assert main(command) == ExitCode.USAGE
    assert "--algorithm (eplb) ignores the limit on moves" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_a_failure(
    profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", "placement", "--profile", str(profile), "--devices", "2"]
    assert main([*command, "--plot", str(tmp_path / "no" / "page.html")]) == ExitCode.FAILED
    assert "cannot write" in capsys.readouterr().err
