"""Files that commands write."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from cluster.cli.cluster.node import _make_token
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import save
from tests.harness.faulty_files import Fault, FaultyFiles, Killed, each_fault


def test_a_file_that_cannot_be_replaced_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    save(path, "old")
    with FaultyFiles(tmp_path, Fault(0, lasts=True)), pytest.raises(CommandError) as caught:
        save(path, "new")
    assert caught.value.code is ExitCode.FAILED
    assert str(caught.value) == f"cannot write {path}: No space left on device"
    assert path.read_text() == "old"


def test_a_token_is_whole_or_not_there(tmp_path: Path) -> None:
    for folder, fault in each_fault(tmp_path):
        path = folder / "token"
        with FaultyFiles(folder, fault), contextlib.suppress(CommandError, Killed):
            _make_token(path)
        assert not path.exists() or len(path.read_text()) == 64, fault
