"""The command ``load``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cluster.cli.main import main
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.core.load_profile import load_profile
from tests.cluster.cli.fake_gateway import LOAD, FakeGateway


def test_the_busiest_experts_of_each_layer(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--url", gateway.url, "load", "--top", "2"]) == ExitCode.OK
    printed = capsys.readouterr()
    assert printed.err.startswith("5 tokens since the start, 2 in the newest window")
    lines = [line.split() for line in printed.out.splitlines()]
    row = ["mlp", "3:40.0%", "2:30.0%", "(even", "25.0%)", "0.800", "-", "0.900"]
    assert lines[1] == ["0", *row]
    assert lines[2] == ["1", *row]
    assert lines[3] == ["all", "0.800", "-", "0.900"]


def test_another_view(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", gateway.url, "load", "--of", "window", "--top", "1"]) == ExitCode.OK
    assert "3:75.0%" in capsys.readouterr().out
    assert main(["--url", gateway.url, "load", "--of", "average"]) == ExitCode.OK
    assert "no load yet" in capsys.readouterr().out


def test_the_document_is_the_gateways(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--url", gateway.url, "--json", "load"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == LOAD


def test_a_saved_load_is_a_profile_that_plans_can_use(
    gateway: FakeGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "load.json"
    assert main(["--url", gateway.url, "load", "--save", str(path)]) == ExitCode.OK
    profile = load_profile(path)
    assert (profile.model, profile.top_k, profile.tokens) == ("demo", 2, 5)
    assert [b.counts for b in profile.banks] == [(1, 2, 3, 4)] * 2
    plan = ["plan", "placement", "--profile", str(path), "--devices", "2"]
    assert main(plan) == ExitCode.OK
    assert main(["--url", gateway.url, "load", "--save", str(path), "--merge"]) == ExitCode.OK
    assert "10 tokens" in capsys.readouterr().err
    assert [b.counts for b in load_profile(path).banks] == [(2, 4, 6, 8)] * 2
    window = ["load", "--of", "window", "--save", str(path)]
    assert main(["--url", gateway.url, *window]) == ExitCode.OK
    assert [b.counts for b in load_profile(path).banks] == [(0, 0, 1, 3)] * 2


def test_what_cannot_be_saved(
    gateway: FakeGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "load.json"
    nothing = ["load", "--of", "average", "--save", str(path)]
    assert main(["--url", gateway.url, *nothing]) == ExitCode.REFUSED
    assert not path.exists()
    assert main(["--url", gateway.url, "load", "--merge"]) == ExitCode.USAGE
    missing = str(tmp_path / "none" / "load.json")
    assert main(["--url", gateway.url, "load", "--save", missing]) == ExitCode.FAILED
    path.write_text('{"schema": 1, "model": "x", "top_k": 9, "tokens": 1, "banks": []}')
    merge = ["load", "--save", str(path), "--merge"]
    assert main(["--url", gateway.url, *merge]) == ExitCode.REFUSED
    assert "must have the banks" in capsys.readouterr().err
