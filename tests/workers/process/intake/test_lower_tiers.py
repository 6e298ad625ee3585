"""Tiers are opened as configured; a disk that fails keeps no worker from serving."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from benchmarks.harness.engine_stream import TIMEOUT_S
from benchmarks.harness.local_engine import LocalEngine
from cluster.config.kv_tiers import KvTiersSection
from cluster.core.errors import ConfigError
from tests.workers.kv.tiers.test_host import known, leave, names_of, use_of
from tests.workers.kv.transfer.test_store import engine_of
from workers.kv.tiers.disk import DiskTier
from workers.kv.tiers.folders import claim_folder
from workers.kv.tiers.tiers import KvTiers
from workers.process.intake import lower_tiers
from workers.process.intake.lower_tiers import open_tiers

MIB = 2**20
PIB = 2**50


@pytest.fixture(scope="module")
def local(tiny_checkpoint: Path) -> LocalEngine:
    return engine_of(tiny_checkpoint)


def opened(local: LocalEngine, **fields: object) -> KvTiers | None:
    section = KvTiersSection(**fields)  # type: ignore[arg-type]
    return open_tiers(section, local.engine.cache, 0.5, 0)


def on_disk(local: LocalEngine, folder: Path) -> KvTiers:
    tiers = opened(local, kv_host_bytes=MIB, kv_disk_bytes=MIB, kv_disk_dir=str(folder))
    assert tiers is not None
    return tiers


def in_use(local: LocalEngine, folder: Path, identity: str = "one") -> KvTiers:
    tiers = on_disk(local, folder)
    tiers.use(identity)
    assert tiers.wait_written(TIMEOUT_S)
    return tiers


def is_usable(tiers: KvTiers) -> float:
    return tiers.stats()['kv_tier_usable{tier="disk"}']


def test_there_are_none_by_default(local: LocalEngine) -> None:
    assert opened(local) is None


def test_more_memory_than_there_is_is_refused(local: LocalEngine) -> None:
    with pytest.raises(ConfigError, match=r"kv_host_bytes .* less than the memory of the machine"):
        opened(local, kv_host_bytes=PIB)


def test_more_disk_than_there_is_is_refused(local: LocalEngine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_disk_bytes .* must not exceed the file system"):
        opened(local, kv_host_bytes=MIB, kv_disk_bytes=PIB, kv_disk_dir=str(tmp_path))
    claimed = claim_folder(tmp_path, 0)
    assert claimed.path == tmp_path / "0"  # it is free again
    claimed.release()


def test_a_folder_is_for_its_user_alone(local: LocalEngine, tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    with closing(in_use(local, folder)) as tiers:
        assert [tier.name for tier in tiers.tiers] == ["host", "disk"]
        assert stat.S_IMODE((folder / "0").stat().st_mode) == 0o700
        assert (folder / "0" / "identity").read_text() == "one"


def put_file(folder: Path) -> None:
    folder.write_text("")


def put_link_to_itself(folder: Path) -> None:
    folder.symlink_to(folder)


def put_dangling_link(folder: Path) -> None:
    folder.symlink_to(folder.with_name("nothing") / "at all")


@pytest.mark.parametrize("damage", [put_file, put_link_to_itself, put_dangling_link])
def test_a_worker_serves_without_a_disk_that_cannot_be_opened(
    local: LocalEngine, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    folder = tmp_path / "kv"
    damage(folder)
    with closing(on_disk(local, folder)) as tiers:
        tiers.use("one")
        assert [tier.name for tier in tiers.tiers] == ["host"]
        assert str(folder) in tiers.problem
        assert is_usable(tiers) == 0.0
        assert leave(tiers, use_of("abc")) == 3
        assert tiers.tiers_of(names_of("abc")) == ["host"] * 3


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), OSError(28, "No space left")])
def test_a_disk_that_fails_is_tried_again(
    local: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    monkeypatch.setattr("workers.kv.tiers.disk_writer.RETRY_S", 0.01)
    may_open = threading.Event()

    def scan(disk: DiskTier) -> dict[bytes, object]:
        if not may_open.is_set():
            raise error
        return {}

    monkeypatch.setattr(DiskTier, "_scan", scan)
    with closing(on_disk(local, tmp_path)) as tiers:
        tiers.use("one")
        assert tiers.problem == str(error)
        may_open.set()
        tiers._writer.wait_usable(TIMEOUT_S)  # type: ignore[union-attr]
        assert (tiers.problem, is_usable(tiers)) == ("", 1.0)
        leave(tiers, use_of("ab"))
        assert tiers.wait_written(TIMEOUT_S)
        assert known(tiers.tiers[1], "ab") == 2


def test_a_disk_that_hangs_does_not_hold_up_the_start(
    local: LocalEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lower_tiers, "OPEN_LIMIT_S", 0.01)
    monkeypatch.setattr("workers.kv.tiers.disk_writer.SLOW_S", 0.0)
    may_answer = threading.Event()

    def hang(base: Path, rank: int) -> object:
        assert may_answer.wait(TIMEOUT_S)
        return claim_folder(base, rank)

    monkeypatch.setattr(lower_tiers, "claim_folder", hang)
    with closing(on_disk(local, tmp_path)) as tiers:
        tiers.use("one")
        assert [tier.name for tier in tiers.tiers] == ["host"]
        assert "has not answered" in tiers.problem
        assert leave(tiers, use_of("ab")) == 2
        may_answer.set()
        tiers._writer.wait_usable(TIMEOUT_S)  # type: ignore[union-attr]
        assert tiers.wait_written(TIMEOUT_S)
        assert known(tiers.tiers[1], "ab") == 2, "what was left meanwhile is written"


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("damage", [make_folder, make_link, make_pipe])
def test_an_entry_that_cannot_be_read_is_left_out(
    local: LocalEngine, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    with closing(in_use(local, tmp_path)) as tiers:
        leave(tiers, use_of("abc"))
        leave(tiers, use_of("xy"))
        assert tiers.wait_written(TIMEOUT_S)
    (path,) = tmp_path.rglob(f"{names_of('abc')[1].hex()}.kv")
    damage(path)
    with closing(in_use(local, tmp_path)) as tiers:
        disk = tiers.tiers[1]
        assert (known(disk, "abc"), known(disk, "xy"), disk.num_broken) == (1, 2, 1)
        assert (tiers.problem, is_usable(tiers)) == ("", 1.0)


@pytest.mark.parametrize("name", ["identity", "lock", "0"])
def test_a_folder_with_something_in_the_way_is_used_or_left_for_another(
    local: LocalEngine, tmp_path: Path, name: str
) -> None:
    if name == "0":
        (tmp_path / "0").write_text("")
    else:
        (tmp_path / "0" / name / "something").mkdir(parents=True)
    with closing(in_use(local, tmp_path)) as tiers:
        leave(tiers, use_of("ab"))
        assert tiers.wait_written(TIMEOUT_S)
        assert known(tiers.tiers[1], "ab") == 2
        assert tiers.problem == ""


@pytest.fixture
def unreadable(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "0"
    folder.mkdir(mode=0)
    yield tmp_path
    folder.chmod(0o700)


def test_a_folder_of_another_user_is_left_to_it(
    local: LocalEngine, unreadable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: object, *words: int, **named: int) -> int:  # the tests may run as root
        if str(path) == str(unreadable / "0" / "lock"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *words, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", refuse)
    with closing(in_use(local, unreadable)) as tiers:
        assert (unreadable / "1" / "identity").read_text() == "one"
        assert is_usable(tiers) == 1.0


def test_blocks_of_another_arithmetic_are_not_found(local: LocalEngine, tmp_path: Path) -> None:
    with closing(in_use(local, tmp_path, "exact fma")) as tiers:
        leave(tiers, use_of("abc"))
        assert tiers.wait_written(TIMEOUT_S)
    with closing(in_use(local, tmp_path, "exact dot")) as tiers:
        assert tiers.tiers_of(names_of("abc")) == []
        leave(tiers, use_of("xyz"))
        assert tiers.wait_written(TIMEOUT_S)
        tiers.use("not exact")  # a worker of another arithmetic has joined
        assert tiers.wait_written(TIMEOUT_S)
        assert known(tiers.tiers[1], "xyz") == 0
        leave(tiers, use_of("uv"))
        assert tiers.wait_written(TIMEOUT_S)
    with closing(in_use(local, tmp_path, "exact dot")) as tiers:
        assert tiers.tiers_of(names_of("xyz")) == tiers.tiers_of(names_of("uv")) == []
    assert not list(tmp_path.rglob("*.kv"))
