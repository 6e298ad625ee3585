"""The audit of dependencies: what it finds, and that it never fails for want of a network."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

from tests.paths import ROOT

HOLE = {"id": "PYSEC-2026-1", "aliases": ["CVE-2026-1"], "fix_versions": ["1.2"]}


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(*holes: Mapping[str, object]) -> str:
    packages = [
        {"name": "sound", "version": "1.0", "vulns": []},
        {"name": "holed", "version": "1.1", "vulns": [dict(hole) for hole in holes]},
        {"name": "torch", "skip_reason": "not found"},
    ]
    return json.dumps({"dependencies": packages, "fixes": []})


def test_known_holes_are_told(audit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = audit.read_report(report(HOLE, {**HOLE, "id": "PYSEC-2026-2", "fix_versions": []}), "")
    assert lines == [
        "holed 1.1: PYSEC-2026-1, repaired in 1.2",
        "holed 1.1: PYSEC-2026-2, repaired in no version yet",
    ]
    assert audit.read_report(report(), "") == []
    monkeypatch.setitem(audit.IGNORED, "CVE-2026-1", "not used")
    assert audit.read_report(report(HOLE), "") == []


@pytest.mark.parametrize("stdout", ["", "no JSON", "[]", '{"a": 1}'])
def test_no_report_is_no_finding(audit: ModuleType, stdout: str) -> None:
    with pytest.raises(audit.UnreachableError, match="connection refused"):
        audit.read_report(stdout, "a traceback\nconnection refused\n")


def test_without_network_it_is_skipped_in_one_line(
    audit: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(audit, "PACKAGE", "no-such-package-as-this==7")
    assert audit.main(["--venv", str(tmp_path)]) == 0
    told = capsys.readouterr().err
    assert told.startswith("expertmesh audit: skipped, pip-audit cannot be installed: ")
    assert told.count("\n") == 1


def test_holes_fail_the_command(
    audit: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(audit, "install", lambda folder: folder)
    monkeypatch.setattr(audit, "audit", lambda python, requirements: ["a hole"])
    assert audit.main(["--venv", str(tmp_path)]) == 1
    monkeypatch.setattr(audit, "audit", lambda python, requirements: [])
    assert audit.main(["--venv", str(tmp_path)]) == 0
