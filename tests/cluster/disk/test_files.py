"""``cluster.disk.files``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.disk.files import RecordFile, replace_file
from tests.harness.faulty_files import FaultyFiles, Killed, each_fault

RECORDS = [f"record {number}\n".encode() * 20 for number in range(4)]
OLD, NEW = b"old " * 3000, b"new " * 5000


def append_all(path: Path, files: FaultyFiles) -> list[bytes]:
    """The records that the file took; after the last one the disk is well again."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    records, taken = RecordFile(fd), []
    for record in RECORDS[:-1]:
        try:
            records.append(record)
        except OSError:
            continue
        taken.append(record)
    files.heal()
    records.append(RECORDS[-1])
    os.close(fd)
    return [*taken, RECORDS[-1]]


def test_a_record_is_there_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    for folder, fault in each_fault(tmp_path):
        path = folder / "records"
        try:
            with FaultyFiles(folder, fault) as files:
                taken = append_all(path, files)
        except OSError:
            assert not path.exists() or not path.read_bytes(), fault
        except Killed:
            found = path.read_bytes() if path.exists() else b""
            assert b"".join(RECORDS).startswith(found), fault
        else:
            assert path.read_bytes() == b"".join(taken), fault


@pytest.mark.parametrize("has_old", [True, False])
def test_a_replaced_file_is_old_or_new(tmp_path: Path, has_old: bool) -> None:
    def prepare(folder: Path) -> None:
        if has_old:
            (folder / "file").write_bytes(OLD)

    for folder, fault in each_fault(tmp_path, prepare):
        path = folder / "file"
        is_done = is_killed = False
        with FaultyFiles(folder, fault):
            try:
                replace_file(path, NEW)
                is_done = True
            except OSError:
                pass
            except Killed:
                is_killed = True
        found = path.read_bytes() if path.exists() else None
        assert found in ([NEW] if is_done else [NEW, OLD if has_old else None]), fault
        lasts = fault.lasts  # then no draft can be removed either
        assert is_killed or lasts or list(folder.iterdir()) in ([path], []), fault
        replace_file(path, NEW)
        assert path.read_bytes() == NEW


def test_what_a_path_is_stays(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(OLD)
    target.chmod(0o640)
    link.symlink_to(target)
    replace_file(link, NEW)
    assert link.is_symlink()
    assert target.read_bytes() == NEW
    assert target.stat().st_mode & 0o777 == 0o640
    replace_file(Path("/dev/null"), NEW)
    assert Path("/dev/null").is_char_device()
    replace_file(tmp_path / "secret", NEW, 0o600)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
