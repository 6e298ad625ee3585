"""Of a process that a fault has killed, its own files are closed, and no others."""

from __future__ import annotations

import contextlib
import os
from io import FileIO
from pathlib import Path

from tests.harness.faulty_files import Fault, FaultyFiles, Killed


def test_a_kill_closes_no_file_of_others(tmp_path: Path) -> None:
    """A thread of the tests has opened a number that the killed work had had before."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "read").touch()
    with FaultyFiles(folder, Fault(1, "kill before")), contextlib.suppress(Killed):
        with FileIO(folder / "read", opener=os.open) as file:
            number = file.fileno()
        other = os.open(tmp_path, os.O_RDONLY)
        (folder / "new").mkdir()
    assert other == number
    os.fstat(other)
    os.close(other)


def test_a_kill_closes_what_it_had_opened(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with FaultyFiles(tmp_path, Fault(1, "kill after")), contextlib.suppress(Killed):
        for name in ("one", "two", "three"):
            os.open(tmp_path / name, os.O_CREAT | os.O_RDWR)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert len(os.listdir("/proc/self/fd")) == len(before)
