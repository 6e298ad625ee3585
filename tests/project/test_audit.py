"""The audit of dependencies: what it finds, and that it never fails for want of a network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest

from tests.project.scripts import load_script

HOLE = {"id": "PYSEC-2026-1", "aliases": ["CVE-2026-1"], "fix_versions": ["1.2"]}


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    return load_script("audit")


def report(*holes: Mapping[str, object]) -> str:
    packages = [
        {"name": "sound", "version": "1.0", "vulns": []},
        {"name": "holed", "version": "1.1", "vulns": [dict(hole) for hole in holes]},
        {"name": "torch", "skip_reason": "not found"},
    ]
    return json.dumps({"dependencies": packages, "fixes": []})


def test_known_holes_are_reported(audit: ModuleType) -> None:
    lines = audit.read_report(report(HOLE, {**HOLE, "id": "PYSEC-2026-2", "fix_versions": []}), "")
    assert lines == [
        "holed 1.1: PYSEC-2026-1, repaired in 1.2",
        "holed 1.1: PYSEC-2026-2, repaired in no version yet",
    ]
    assert audit.read_report(report(), "") == []
    assert audit.read_report(report(HOLE), "", {"CVE-2026-1"}) == []


@pytest.mark.parametrize("stdout", ["", "no JSON", "[]", '{"a": 1}'])
def test_no_report_is_no_finding(audit: ModuleType, stdout: str) -> None:
    with pytest.raises(audit.UnreachableError, match="connection refused"):
        audit.read_report(stdout, "a traceback\nconnection refused\n")


def fake_python(folder: Path, pip: str, pip_audit: str = "") -> None:
    """The Python of an environment: what its modules ``pip`` and ``pip_audit`` do."""
    path = folder / "bin" / "python"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\ncase $2 in pip) {pip} ;; *) {pip_audit} ;; esac\n")
    path.chmod(0o755)


def test_without_network_it_is_skipped_in_one_line(
    audit: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_python(tmp_path, "echo trying >&2; echo no index >&2; exit 1")
    assert audit.main(["--venv", str(tmp_path)]) == 0
    expected = "expertmesh audit: skipped, pip-audit cannot be installed: no index\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(("holes", "status"), [((HOLE,), 1), ((), 0)])
def test_holes_fail_the_command(
    audit: ModuleType, tmp_path: Path, holes: tuple[Mapping[str, object], ...], status: int
) -> None:
    fake_python(tmp_path, "exit 0", f"echo '{report(*holes)}'")
    assert audit.main(["--venv", str(tmp_path)]) == status
