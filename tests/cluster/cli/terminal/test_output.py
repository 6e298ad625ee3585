"""Files and streams that commands write."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from io import BytesIO, TextIOBase, TextIOWrapper
from pathlib import Path

import pytest

from cluster.cli.cluster.node import _make_token
from cluster.cli.main import main
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import note, save, write_result
from cluster.cli.terminal.progress import Progress
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


@pytest.fixture
def full() -> Iterator[TextIOBase]:
    """A stream on a full disk."""
    with contextlib.suppress(OSError), Path("/dev/full").open("w") as stream:
        yield stream


def test_a_result_that_cannot_be_written_is_an_error(
    full: TextIOBase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", full)
    assert main(["version"]) == ExitCode.FAILED
    reason = "the output cannot be written: No space left on device"
    assert capsys.readouterr().err == f"expertmesh: {reason}\n"
    full.close()  # nothing is left that fails at exit


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("latin-1", b"\xe9 \\u65e5 \\ud800"), ("utf-8", "é 日 \\ud800".encode())],
)
def test_characters_that_the_encoding_lacks_are_escaped(
    monkeypatch: pytest.MonkeyPatch, encoding: str, shown: bytes
) -> None:
    stream = TextIOWrapper(BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    write_result("é 日 \ud800")
    assert stream.buffer.getvalue() == shown


def test_a_command_continues_when_people_cannot_be_told(
    full: TextIOBase, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", full)
    note("a warning")
    now_s = 0.0
    progress = Progress(clock=lambda: now_s)
    now_s = 60.0
    progress.update("ray")
    assert main(["version", "--json"]) == ExitCode.OK
    assert "version" in capsys.readouterr().out
