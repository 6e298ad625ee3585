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
    with FaultyFiles(tmp_path, Fault(1, "kill after")), contextlib.suppress(Killed):
        for name in ("one", "two", "three"):
            os.open(tmp_path / name, os.O_CREAT | os.O_RDWR)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert not _open_below(tmp_path)


def test_the_open_files_of_a_folder_are_seen(tmp_path: Path) -> None:
    with open(tmp_path / "one", "w"):
        assert _open_below(tmp_path) == [tmp_path / "one"]


def _open_below(folder: Path) -> list[Path]:
    """The files below `folder` that this process has open.

    Other threads open and close files of their own meanwhile, so only this folder's count.
    """
    paths = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # Closed since it was listed.
            paths.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
    return sorted(path for path in paths if folder in path.parents)
