"""Blocks on disk: whole or not there, of one process at a time, and there again after a restart."""

from __future__ import annotations

import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.workers.kv.tiers.test_host import (
    BLOCK_BYTES,
    Clock,
    data_of,
    known,
    leave,
    names_of,
    put_all,
    use_of,
)
from workers.kv.tiers.disk import DiskTier
from workers.kv.tiers.disk_writer import DiskWriter
from workers.kv.tiers.folders import UNUSED_S, claim_folder, delete_abandoned
from workers.kv.tiers.host import HostTier
from workers.kv.tiers.tiers import KvTiers
from workers.requests.block_hash import state_key

TIMEOUT_S = 30.0


def disk_of(path: Path, num_blocks: int = 10, identity: str = "one", rank: int = 0) -> DiskTier:
    disk = DiskTier(claim_folder(path, rank), num_blocks * BLOCK_BYTES)
    disk.use(identity)
    disk.erase()
    return disk


def tiers_of(host: HostTier, disk: DiskTier) -> KvTiers:
    """Both tiers, in use."""
    tiers = KvTiers(host, DiskWriter(host, lambda: disk))
    tiers.use("one")
    assert tiers.wait_written(TIMEOUT_S)
    return tiers


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskTier]:
    with closing(disk_of(tmp_path)) as found:
        yield found


def file_of(path: Path, name: bytes) -> Path:
    (found,) = path.rglob(f"{name.hex()}.kv")
    return found


def check_contents(disk: DiskTier, chain: str, count: int) -> None:
    assert known(disk, chain) == count
    for name in names_of(chain)[:count]:
        data = disk.read(name)
        assert data is not None
        assert torch.equal(data, data_of(name))


def test_what_was_put_is_read(disk: DiskTier) -> None:
    assert leave(disk, use_of("abc")) == 3
    check_contents(disk, "abcd", 3)
    assert disk.read(names_of("abcd")[3]) is None


def test_what_gives_way_leaves_no_file(disk: DiskTier, tmp_path: Path) -> None:
    for start in "0123456789":
        leave(disk, use_of(f"{start}bc"))
    assert disk.num_bytes == 10 * BLOCK_BYTES
    assert len(list(tmp_path.rglob("*.kv"))) == 10


def test_tenants_have_folders_and_parts(disk: DiskTier, tmp_path: Path) -> None:
    leave(disk, use_of("abcdefghij", "one"))
    leave(disk, use_of("klmnopqrst", "two"))
    assert (disk.bytes_of("one"), disk.bytes_of("two")) == (50, 50)
    folders = {path.parent.name for path in tmp_path.rglob("*.kv")}
    assert len(folders) == 2
    assert not any("one" in name or "two" in name for name in folders)


def test_a_later_process_goes_on_with_the_files(tmp_path: Path) -> None:
    with closing(disk_of(tmp_path)) as first:
        leave(first, use_of("abc", "one"))
        leave(first, use_of("abx", "one"))
    with closing(disk_of(tmp_path)) as second:
        second.check_integrity()
        check_contents(second, "abc", 3)
        check_contents(second, "abx", 3)
        assert second.bytes_of("one") == 4 * BLOCK_BYTES
        assert set(second.take_touched()) == {*names_of("abc"), *names_of("abx")}
        leave(second, use_of("abcdefghij", "one"))
        check_contents(second, "abcdefghij", 10)


def test_states_are_states_after_a_restart(tmp_path: Path) -> None:
    use = use_of("ab")
    state = state_key(use.names[-1])
    with closing(disk_of(tmp_path)) as first:
        turn = first.begin(use)
        put_all(first, turn, use.names)
        assert first.put(turn, state, use.names[-1], data_of(state))
        first.end(turn)
        assert first.is_state(state)
    with closing(disk_of(tmp_path)) as second:
        assert second.is_state(state)
        assert not second.is_state(use.names[-1])
        assert state not in second.take_touched()


def test_a_smaller_disk_keeps_beginnings_of_the_latest(tmp_path: Path) -> None:
    with closing(disk_of(tmp_path)) as first:
        leave(first, use_of("abcde"))
        leave(first, use_of("uvw"))
    for place, chain in enumerate(("abcde", "uvw")):
        for name in names_of(chain):
            os.utime(file_of(tmp_path, name), (1000.0 + place, 1000.0 + place))
    with closing(disk_of(tmp_path, num_blocks=4)) as second:
        second.check_integrity()
        check_contents(second, "uvw", 3)
        check_contents(second, "abcde", 1)
    assert len(list(tmp_path.rglob("*.kv"))) == 4


@pytest.mark.parametrize(("num_blocks", "counts"), [(4, (0, 4)), (6, (0, 6)), (8, (2, 6))])
def test_a_smaller_disk_keeps_no_block_without_its_parent(
    tmp_path: Path, num_blocks: int, counts: tuple[int, int]
) -> None:
    with closing(disk_of(tmp_path)) as first:
        leave(first, use_of("uvw"))
        leave(first, use_of("abcdef"))
    for second, name in enumerate((*names_of("abc"), *names_of("uvw"), *names_of("abcdef")[3:])):
        os.utime(file_of(tmp_path, name), (1000.0 + second, 1000.0 + second))
    with closing(disk_of(tmp_path, num_blocks=num_blocks)) as later:
        later.check_integrity()
        check_contents(later, "uvw", counts[0])
        check_contents(later, "abcdef", counts[1])
    assert len(list(tmp_path.rglob("*.kv"))) == sum(counts)


def test_other_contents_are_deleted(tmp_path: Path) -> None:
    with closing(disk_of(tmp_path)) as first:
        leave(first, use_of("abc"))
    with closing(disk_of(tmp_path, identity="another model")) as second:
        assert second.num_bytes == 0
        assert not list(tmp_path.rglob("*.kv"))
    with closing(disk_of(tmp_path)) as third:
        assert third.num_bytes == 0


def test_nothing_but_items_is_deleted(tmp_path: Path) -> None:
    with closing(disk_of(tmp_path)):
        pass
    other = tmp_path / "0" / "notes.txt"
    other.write_text("mine")
    with closing(disk_of(tmp_path, identity="another model")):
        assert other.read_text() == "mine"


def test_two_processes_share_no_folder(tmp_path: Path) -> None:
    with closing(disk_of(tmp_path)) as first:
        leave(first, use_of("abc"))
        with closing(disk_of(tmp_path)) as second:
            assert second.num_bytes == 0
            leave(second, use_of("xy"))
        with closing(disk_of(tmp_path, rank=1)) as third:
            check_contents(third, "xy", 2)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"File exists: .*file"):
        disk_of(tmp_path / "file")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def blank(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def swap(path: Path) -> None:
    other = next(p for p in path.parent.glob("*.kv") if p != path)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [flip, cut, blank, empty, swap, Path.unlink])
def test_a_broken_file_is_a_miss(
    disk: DiskTier, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    leave(disk, use_of("abc"))
    name = names_of("abc")[1]
    damage(file_of(tmp_path, name))
    assert disk.read(name) is None
    assert disk.num_broken == 1
    assert known(disk, "abc") == 1
    disk.erase()
    assert not list(tmp_path.rglob(f"{name.hex()}.kv"))
    assert leave(disk, use_of("abc")) == 3
    check_contents(disk, "abc", 3)


@pytest.mark.parametrize("damage", [flip, cut, blank, empty, swap, Path.unlink])
def test_a_broken_file_is_a_miss_after_a_restart(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    with closing(disk_of(tmp_path)) as first:
        leave(first, use_of("abc"))
    name = names_of("abc")[1]
    damage(file_of(tmp_path, name))
    with closing(disk_of(tmp_path)) as second:
        assert second.read(name) is None
        assert known(second, "abc") == 1
        check_contents(second, "abc", 1)
        second.check_integrity()


def test_a_disk_that_cannot_be_written_keeps_nothing(disk: DiskTier, tmp_path: Path) -> None:
    leave(disk, use_of("ab"))
    for number in range(3, 12):
        (tmp_path / "0" / f"{number}.new").mkdir()  # as a full disk would refuse the file
    assert leave(disk, use_of("abc")) == 2
    assert disk.num_skipped == 1
    check_contents(disk, "abc", 2)


WRITER = """
import sys
from pathlib import Path
from tests.workers.kv.tiers.test_disk import disk_of
from tests.workers.kv.tiers.test_host import leave, use_of
disk = disk_of(Path(sys.argv[1]), num_blocks=10**6)
print("ready", flush=True)
for number in range(10**6):
    leave(disk, use_of("".join(map(chr, [256 + number, 97, 98, 99]))))
    print(number, flush=True)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_blocks(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    draw = random.Random(3)
    for _ in range(2):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(draw.randrange(5, 40)):
                last = writer.stdout.readline()
            writer.send_signal(signal.SIGKILL)
        with closing(disk_of(tmp_path, num_blocks=10**6)) as disk:
            disk.check_integrity()
            assert len(disk._here) >= 4 * int(last)
            for name in disk._here:
                data = disk.read(name)
                assert data is not None
                assert torch.equal(data, data_of(name))
            assert disk.num_broken == 0


def test_a_turn_goes_on_to_the_disk(tmp_path: Path) -> None:
    tiers = tiers_of(HostTier(4 * BLOCK_BYTES), disk_of(tmp_path))
    leave(tiers, use_of("abc"))
    assert tiers.wait_written(TIMEOUT_S)
    leave(tiers, use_of("uvwx"))
    assert tiers.wait_written(TIMEOUT_S)
    assert tiers.tiers_of(names_of("abc")) == ["disk"] * 3
    assert tiers.tiers_of(names_of("uvwx")) == ["host"] * 4
    held = tiers.read(names_of("abc")[2])
    assert held is not None
    assert (held.tier, held.data.tolist()) == ("disk", data_of(names_of("abc")[2]).tolist())
    tiers.forget(names_of("abc")[1:])
    assert tiers.tiers_of(names_of("abc")) == ["disk"]
    tiers.close()


def test_files_are_deleted_by_the_thread_that_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiers = tiers_of(HostTier(4 * BLOCK_BYTES), disk_of(tmp_path))
    leave(tiers, use_of("ab"))
    assert tiers.wait_written(TIMEOUT_S)
    deleted, unlink = queue.Queue[tuple[str, str]](), Path.unlink

    def note(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        deleted.put((path.stem, threading.current_thread().name))

    monkeypatch.setattr(Path, "unlink", note)
    tiers.forget(names_of("ab"))
    found = {deleted.get(timeout=TIMEOUT_S) for _ in range(2)}
    assert found == {(name.hex(), "kv-disk-writer") for name in names_of("ab")}
    assert not list(tmp_path.rglob("*.kv"))
    tiers.close()


def test_what_is_forgotten_on_its_way_does_not_reach_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, disk = HostTier(4 * BLOCK_BYTES), disk_of(tmp_path)
    tiers, read = tiers_of(host, disk), host.read

    def read_and_forget(name: bytes) -> Tensor | None:
        data = read(name)
        tiers.forget(names_of("a"))
        return data

    monkeypatch.setattr(host, "read", read_and_forget)
    leave(tiers, use_of("a"))
    assert tiers.wait_written(TIMEOUT_S)
    assert known(disk, "a") == 0
    tiers.close()
    assert not list(tmp_path.rglob("*.kv"))


def test_a_turn_that_cannot_be_read_stops_no_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, disk = HostTier(4 * BLOCK_BYTES), disk_of(tmp_path)
    tiers, read = tiers_of(host, disk), host.read

    def fail(name: bytes) -> Tensor | None:
        if name == names_of("ab")[0]:
            raise MemoryError
        return read(name)

    monkeypatch.setattr(host, "read", fail)
    leave(tiers, use_of("ab"))
    leave(tiers, use_of("xy"))
    assert tiers.wait_written(TIMEOUT_S)
    assert (known(disk, "ab"), known(disk, "xy")) == (0, 2)
    disk.check_integrity()
    tiers.close()


def test_a_folder_is_kept_while_something_may_write_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.kv.tiers.disk_writer._STOP_S", 0.0)
    host = HostTier(4 * BLOCK_BYTES)
    tiers, read = tiers_of(host, disk_of(tmp_path)), host.read
    reads, may_read = threading.Event(), threading.Event()

    def hang(name: bytes) -> Tensor | None:
        reads.set()
        assert may_read.wait(TIMEOUT_S)
        return read(name)

    monkeypatch.setattr(host, "read", hang)
    leave(tiers, use_of("ab"))
    assert reads.wait(TIMEOUT_S)
    tiers.close()
    with closing(disk_of(tmp_path)) as other:
        assert leave(other, use_of("x")) == 1
        assert file_of(tmp_path, names_of("x")[0]).is_relative_to(tmp_path / "1")
    may_read.set()
    monkeypatch.setattr("workers.kv.tiers.disk_writer._STOP_S", TIMEOUT_S)
    tiers.close()


def test_names_that_mean_something_else_later_stay_in_memory(tmp_path: Path) -> None:
    disk = disk_of(tmp_path)
    tiers = tiers_of(HostTier(4 * BLOCK_BYTES), disk)
    leave(tiers, replace(use_of("abc"), may_outlive=False))
    leave(tiers, use_of("xy"))
    assert tiers.wait_written(TIMEOUT_S)
    assert (known(disk, "abc"), known(disk, "xy")) == (0, 2)
    assert known(tiers.host, "xy") == 2
    tiers.close()


def test_a_tenant_that_has_gone_gives_way_first(tmp_path: Path) -> None:
    clock = Clock()
    with closing(DiskTier(claim_folder(tmp_path, 0), 6 * BLOCK_BYTES, clock=clock)) as disk:
        disk.use("one")
        leave(disk, use_of("abc", "one"))
        clock.now_s = 3600.0
        leave(disk, use_of("uvwxyz", "two"))
        assert (disk.bytes_of("one"), disk.bytes_of("two")) == (0, 60)


def test_folders_of_ranks_that_are_gone_are_deleted(tmp_path: Path) -> None:
    for rank in range(4):
        with closing(disk_of(tmp_path, identity="model\none", rank=rank)) as disk:
            leave(disk, use_of("abc"))
    (tmp_path / "3" / "notes.txt").write_text("mine")
    with closing(disk_of(tmp_path, identity="model\none", rank=1)):
        assert delete_abandoned(tmp_path, {0}, "model\n") == [2, 3]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "3"]
    assert [path.name for path in (tmp_path / "3").iterdir()] == ["notes.txt"]
    with closing(disk_of(tmp_path, identity="model\none")) as disk:
        assert known(disk, "abc") == 3
    with closing(disk_of(tmp_path, identity="model\none", rank=2)) as disk:
        assert leave(disk, use_of("abc")) == 3


def test_a_folder_of_another_cluster_stays_for_a_while(tmp_path: Path) -> None:
    with closing(disk_of(tmp_path, identity="another model\n", rank=2)) as disk:
        leave(disk, use_of("abc"))
    os.utime(tmp_path / "2" / "lock", (0, 0))  # claimed long ago, and written to until now
    os.utime(tmp_path / "2" / "identity", (0, 0))
    assert delete_abandoned(tmp_path, {0}, "model\n") == []
    assert delete_abandoned(tmp_path, {0}, "model\n", time.time() + UNUSED_S + 1) == [2]
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_deleted_keeps_no_other_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in (1, 2):
        with closing(disk_of(tmp_path, identity="model\n", rank=rank)) as disk:
            leave(disk, use_of("abc"))
    unlink = Path.unlink

    def fail(path: Path, missing_ok: bool = False) -> None:
        if path.is_relative_to(tmp_path / "1"):
            raise OSError(5, "Input/output error", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", fail)
    assert delete_abandoned(tmp_path, set(), "model\n") == [2]


def test_a_problem_stays_while_the_disk_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.kv.tiers.disk_writer.RETRY_S", 0.01)
    tries, may_fail = queue.Queue[None](), threading.Semaphore(1)

    def fail() -> DiskTier:
        tries.put(None)
        assert may_fail.acquire(timeout=TIMEOUT_S)
        raise OSError("broken")

    writer = DiskWriter(HostTier(BLOCK_BYTES), fail)
    for _ in range(2):
        tries.get(timeout=TIMEOUT_S)
    assert writer.problem == "broken"
    monkeypatch.setattr("workers.kv.tiers.disk_writer.SLOW_S", 0.0)
    assert "has not answered" in writer.problem
    may_fail.release(1000)
    writer.close()


def test_a_worker_looks_for_abandoned_folders_when_its_generation_is_known(tmp_path: Path) -> None:
    looks = queue.Queue[None]()
    host, disk = HostTier(4 * BLOCK_BYTES), disk_of(tmp_path)
    tiers = KvTiers(host, DiskWriter(host, lambda: disk, lambda: looks.put(None)))
    looks.get(timeout=TIMEOUT_S)
    tiers.use("another one")
    looks.get(timeout=TIMEOUT_S)
    tiers.close()
