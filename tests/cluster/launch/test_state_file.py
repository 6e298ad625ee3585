from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.cli.main import make_parser
from cluster.cli.terminal.client import find_url
from cluster.core.errors import ConfigError
from cluster.core.process import ProcessIdentity
from cluster.launch import state_file
from cluster.launch.orphans import host_id, identify
from tests.harness.faulty_files import FaultyFiles, Killed, each_fault

DEAD = ProcessIdentity(pid=1, started_at=1.0)


def record(name: str, launcher: ProcessIdentity | None = None) -> state_file.ClusterRecord:
    me = identify(os.getpid())
    assert me is not None
    return state_file.ClusterRecord(
        name=name,
        command="up",
        state="ready",
        launcher=launcher or me,
        host=host_id(),
        asked={"MODEL": "", "--port": "8111"},
        http="http://127.0.0.1:8111",
        grpc="127.0.0.1:50111",
        address="127.0.0.1:6379",
        joined=False,
        temp_dir="",
        processes=(me,),
    )


def test_a_record_survives_the_file(state_home: Path) -> None:
    written = record("one")
    state_file.write_record(written)
    assert state_file.read_record("one") == written
    path = state_home / "expertmesh" / "one.json"
    data = json.loads(path.read_text())
    assert data["schema"] == 1
    assert data["ports"] == {"http": 8111, "grpc": 50111}
    assert data["pids"]["launcher"] == os.getpid()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    state_file.remove_record("one")
    assert state_file.read_record("one") is None


def test_a_user_without_a_home_has_no_records(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert list(state_file.all_records()) == []
    with pytest.raises(ConfigError, match="must be set, as this user has no home folder"):
        state_file.write_record(record("one"))


def test_a_record_is_old_or_new_whatever_the_disk_does(
    state_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = record("one"), dataclasses.replace(record("one"), state="starting")

    def prepare(folder: Path) -> None:
        monkeypatch.setenv("XDG_STATE_HOME", str(folder))
        state_file.write_record(old)

    for folder, fault in each_fault(tmp_path, prepare):
        with FaultyFiles(folder, fault), contextlib.suppress(OSError, Killed):
            state_file.write_record(new)
        assert state_file.read_record("one") in (old, new), fault
        state_file.write_record(new)
        assert list(state_file.all_records()) == [new], fault


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "name": "x"}', "[" * 100_000]
)
def test_a_damaged_record_counts_as_none(state_home: Path, text: str) -> None:
    state_file.record_path("bad").write_text(text)
    assert state_file.read_record("bad") is None
    assert list(state_file.all_records()) == []


def test_a_folder_that_cannot_be_made_has_no_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below", "absent"):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / place))
        assert list(state_file.all_records()) == []
        assert state_file.read_record("one") is None
    assert not (tmp_path / "absent").exists()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(
        ConfigError, match=r"XDG_STATE_HOME .* must be a folder that can be written"
    ):
        state_file.log_path("one")


@pytest.mark.parametrize("name", [".#one.json", "one copy (2).json"])
def test_files_of_other_programs_are_no_records(state_home: Path, name: str) -> None:
    state_file.record_path("one").with_name(name).write_text("{}")
    assert list(state_file.all_records()) == []


@pytest.mark.usefixtures("state_home")
@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", "x" * 65])
def test_names_are_file_names(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        state_file.record_path(name)


@pytest.mark.usefixtures("state_home")
def test_a_record_is_alive_with_its_launcher() -> None:
    assert record("one").is_alive
    assert not record("one", DEAD).is_alive
    elsewhere = dataclasses.replace(record("one"), host="another host")
    assert not elsewhere.is_alive


@pytest.mark.usefixtures("state_home")
def test_what_a_killed_launcher_left_is_ended(tmp_path: Path) -> None:
    folder = tmp_path / "em"
    folder.mkdir()
    log = (folder / "worker.out").open("w")
    code = "import time; time.sleep(60)"
    orphan = subprocess.Popen([sys.executable, "-c", code], stdout=log)
    log.close()
    dead = dataclasses.replace(record("gone", DEAD), temp_dir=str(folder), processes=())
    state_file.write_record(dead)
    state_file.write_record(record("alive"))
    lines = state_file.clean_up_dead()
    assert lines == ["cleaned up after gone: 1 processes left by a killed start"]
    assert orphan.wait(timeout=60) < 0
    assert not folder.exists()
    assert [r.name for r in state_file.all_records()] == ["alive"]


@pytest.mark.usefixtures("state_home")
def test_records_of_other_hosts_and_joined_clusters_are_left_alone() -> None:
    state_file.write_record(dataclasses.replace(record("far", DEAD), host="another host"))
    state_file.write_record(dataclasses.replace(record("joined", DEAD), joined=True))
    assert state_file.clean_up_dead() == []
    assert [r.name for r in state_file.all_records()] == ["far", "joined"]


@pytest.mark.usefixtures("state_home")
def test_a_pid_of_another_process_is_not_ended() -> None:
    me = identify(os.getpid())
    assert me is not None
    other = ProcessIdentity(pid=me.pid, started_at=me.started_at - 100.0)
    state_file.write_record(dataclasses.replace(record("gone", DEAD), processes=(other,)))
    assert "0 processes" in state_file.clean_up_dead()[0]


@pytest.mark.usefixtures("state_home")
def test_commands_find_the_cluster_of_this_host() -> None:
    args = make_parser().parse_args(["status"])
    assert find_url(args) == "http://127.0.0.1:8000"
    state_file.write_record(record("only"))
    assert find_url(args) == "http://127.0.0.1:8111"
    default = dataclasses.replace(record("default"), http="http://127.0.0.1:8222")
    state_file.write_record(default)
    assert find_url(args) == "http://127.0.0.1:8222"
    named = make_parser().parse_args(["status", "--name", "only"])
    assert find_url(named) == "http://127.0.0.1:8111"
