"""A disk that fails at any call: blocks are whole or missing, and the worker continues."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch

from tests.harness.faulty_files import FAULTS, FEW_FAULTS, Fault, FaultyFiles, Killed, each_fault
from tests.harness.tiers import quick_rows
from tests.workers.kv.tiers.test_disk import check_contents, disk_of, file_of
from tests.workers.kv.tiers.test_host import BLOCK_BYTES, data_of, leave, names_of, use_of
from workers.kv.tiers.disk import DiskTier
from workers.kv.tiers.folders import claim_folder

pytestmark = pytest.mark.heavy

KINDS = pytest.mark.parametrize("kinds", [FEW_FAULTS, pytest.param(FAULTS, marks=pytest.mark.slow)])
TURNS = ("abc", "xyz", "xyw")


def fill(folder: Path) -> None:
    """What an earlier worker left, of this identity and of another one."""
    with closing(disk_of(folder, identity="other", rank=1)) as other:
        leave(other, use_of("abc"))
    with closing(disk_of(folder)) as disk:
        leave(disk, use_of("abc"))


def work(folder: Path, rank: int) -> None:
    """A worker's use of the disk. Nothing but opening it may fail."""
    try:
        disk = DiskTier(claim_folder(folder, rank), 4 * BLOCK_BYTES)
    except OSError:
        return
    try:
        disk.use("one")
        for turn in TURNS:
            leave(disk, use_of(turn))
            for name in names_of(turn):
                check_read(disk, name)
        disk.forget(names_of("xyw")[2:])
    finally:
        disk.close()


def check_read(disk: DiskTier, name: bytes) -> None:
    data = disk.read(name)
    assert data is None or torch.equal(data, data_of(name))


def spaced(path: Path) -> None:
    name = path.stem
    path.rename(path.with_name(f"{name[:2]} {name[2:]}.kv"))


def upper(path: Path) -> None:
    path.rename(path.with_name(f"{path.stem.upper()}.kv"))


def no_text(path: Path) -> None:
    os.rename(path, os.fsencode(path.parent) + b"/\xff.kv")


@pytest.mark.parametrize("rename", [spaced, upper, no_text])
def test_files_with_other_names_are_deleted(tmp_path: Path, rename: Callable[[Path], None]) -> None:
    """A name that is nearly an item's counts as none: no item may have two files."""
    with closing(disk_of(tmp_path)) as disk:
        leave(disk, use_of("abc"))
    rename(file_of(tmp_path, names_of("abc")[2]))
    with closing(disk_of(tmp_path)) as later:
        check_contents(later, "abc", 2)
        assert later.num_broken == 1
        later.erase()
        assert len(list(tmp_path.rglob("*.kv"))) == 2
        assert leave(later, use_of("abc")) == 3
        check_contents(later, "abc", 3)


def test_many_broken_files_are_one_line_of_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(disk_of(tmp_path)) as disk:
        leave(disk, use_of("abc"))
        (tenant,) = {path.parent for path in tmp_path.rglob("*.kv")}
    for number in range(100):
        (tenant / f"{number:064x}.kv").touch()
    with closing(disk_of(tmp_path)) as later:
        assert later.num_broken == 100
        check_contents(later, "abc", 3)
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1


def link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def no_folder(path: Path) -> None:
    path.symlink_to(path.with_name("nothing"))


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, link_to_itself, no_folder, Path.touch])
def test_what_has_the_name_of_a_block_keeps_no_worker_from_starting(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    with closing(disk_of(tmp_path)) as disk:
        leave(disk, use_of("abc"))
    path = file_of(tmp_path, names_of("abc")[1])
    path.unlink()
    make(path)
    with closing(disk_of(tmp_path)) as later:
        check_contents(later, "abc", 1)
        later.check_integrity()


@pytest.mark.parametrize("make", [os.mkfifo, link_to_itself, no_folder, Path.touch])
def test_what_has_the_name_of_a_folder_keeps_no_worker_from_starting(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    with closing(disk_of(tmp_path)) as disk:
        leave(disk, use_of("abc"))
    (tenant,) = (path for path in (tmp_path / "0").iterdir() if path.is_dir())
    for name in (tenant, tmp_path / "1"):
        if name.exists():
            shutil.rmtree(name)
        make(name)
    with closing(disk_of(tmp_path)) as later:
        assert leave(later, use_of("abc")) == 0
        assert later.failure
        assert leave(later, use_of("abc", "another")) == 3
        assert not later.failure
    with closing(disk_of(tmp_path, rank=1)) as next_to_it:
        assert leave(next_to_it, use_of("abc", "another")) == 3


@KINDS
@pytest.mark.parametrize("rank", quick_rows({1}, [0, 1]))
def test_each_fault_costs_blocks_alone(tmp_path: Path, kinds: Sequence[Fault], rank: int) -> None:
    for folder, fault in each_fault(tmp_path, fill, kinds):
        with FaultyFiles(folder, fault), contextlib.suppress(Killed):
            work(folder, rank)
        with closing(disk_of(folder, num_blocks=4, rank=rank)) as later:
            later.check_integrity()
            for turn in TURNS:
                for name in names_of(turn):
                    check_read(later, name)
            leave(later, use_of("pq"))
            later.erase()
            files = sorted(later.folder.path.rglob("*.kv"))
            assert {path.stem for path in files} == {n.hex() for n in later._order.names}, fault
            assert not list(later.folder.path.glob("*.new")), fault
