"""``logs`` of workers and of the launcher."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.cli.cluster import logs
from cluster.cli.main import main
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.core.process import describe_self
from cluster.launch import state_file
from cluster.launch.orphans import host_id
from cluster.tracing.output_files import rotated_path
from tests.cluster.cli.fake_gateway import FakeGateway
from tests.cluster.launch.test_state_file import record

pytestmark = pytest.mark.usefixtures("state_home")


@pytest.fixture
def ray_folder(tmp_path: Path) -> Path:
    """The logs of a private Ray, whose cluster is recorded as ``mine``."""
    folder = tmp_path / "em"
    (folder / "ray" / "session_latest" / "logs").mkdir(parents=True)
    me = describe_self()
    state_file.write_record(
        state_file.ClusterRecord(
            name="mine",
            command="up",
            state="ready",
            launcher=me,
            asked={},
            http="http://127.0.0.1:1",
            grpc="127.0.0.1:2",
            address="127.0.0.1:3",
            joined=False,
            temp_dir=str(folder),
            host=host_id(),
        )
    )
    return folder / "ray" / "session_latest" / "logs"


def interrupt_without_answers(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupt ``logs --follow`` once the gateway has given all its answers."""

    def wait(seconds: float) -> None:
        if not gateway.admin:
            raise KeyboardInterrupt

    monkeypatch.setattr(logs, "time", SimpleNamespace(sleep=wait))


def test_logs_of_a_worker(
    gateway: FakeGateway, ray_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (ray_folder / "worker-ab-01-11.err").write_text("one\ntwo\nthree\n")
    (ray_folder / "worker-ab-01-11.out").write_text("four\n")
    (ray_folder / "worker-ab-01-12.out").write_text("of another\n")
    words = ["--url", gateway.url, "logs", "attention-0", "--tail", "2"]
    assert main(words) == ExitCode.OK
    shown = capsys.readouterr().out
    assert "two\nthree\n" in shown
    assert "four\n" in shown
    assert "one" not in shown
    assert "another" not in shown
    assert main([*words, "--json"]) == ExitCode.OK
    document = json.loads(capsys.readouterr().out)
    assert [x["lines"] for x in document["logs"]] == [["two", "three"], ["four"]]
    assert main([*words[:-1], "0", "--json"]) == ExitCode.OK
    document = json.loads(capsys.readouterr().out)
    assert [x["lines"] for x in document["logs"]] == [[], []]


def test_logs_that_were_rotated_come_before_the_newer_ones(
    gateway: FakeGateway,
    ray_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    older, newer = ray_folder / "worker-ab-01-11.1.err", ray_folder / "worker-ab-01-11.err"
    older.write_text("one\ntwo\n")
    newer.write_text("three\n")

    def rotate(seconds: float) -> None:
        """The second pause ends the command."""
        if newer.read_text() == "five\n":
            raise KeyboardInterrupt
        newer.write_text("three\nfour\n")
        newer.replace(older)
        newer.write_text("five\n")

    monkeypatch.setattr(logs, "follow_files", partial(logs.follow_files, sleep=rotate))
    words = ["--url", gateway.url, "logs", "attention-0", "--tail", "2", "--follow"]
    assert main(words) == ExitCode.INTERRUPTED
    assert capsys.readouterr().out == "two\nthree\nfour\nfive\n"


def test_logs_that_are_elsewhere(gateway: FakeGateway) -> None:
    code, status = gateway.status
    above_all_pids = 2**22 + 1
    workers = [{**worker, "pid": above_all_pids} for worker in status["workers"]]
    gateway.status = (code, {**status, "workers": workers})
    assert main(["--url", gateway.url, "logs", "attention-0"]) == ExitCode.REFUSED
    assert main(["--url", gateway.url, "logs", "attention-9"]) == ExitCode.REFUSED


@pytest.mark.parametrize(("node", "is_here"), [("127.0.0.1", True), ("203.0.113.9", False)])
def test_logs_of_a_worker_elsewhere_are_not_those_of_the_same_pid(
    gateway: FakeGateway,
    ray_folder: Path,
    capsys: pytest.CaptureFixture[str],
    node: str,
    is_here: bool,
) -> None:
    (ray_folder / "worker-ab-01-11.err").write_text("of another worker\n")
    code, status = gateway.status
    workers = [{**worker, "node": node} for worker in status["workers"]]
    gateway.status = (code, {**status, "workers": workers})
    found = main(["--url", gateway.url, "logs", "attention-0"])
    assert found == (ExitCode.OK if is_here else ExitCode.REFUSED)
    shown = capsys.readouterr()
    assert is_here or f"attention-0 writes its log on {node}" in shown.err
    assert bool(shown.out) is is_here


def test_logs_of_the_launcher(
    ray_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state_file.log_path("mine").write_text("begins\nends\n")
    assert main(["logs", "--tail", "1"]) == ExitCode.OK
    assert capsys.readouterr().out == "ends\n"
    rotated_path(state_file.log_path("mine")).write_text("before the rotation\n")
    assert main(["logs", "--tail", "3"]) == ExitCode.OK
    assert capsys.readouterr().out == "before the rotation\nbegins\nends\n"
    state_file.remove_log("mine")
    assert [path.name for path in state_file.state_dir().iterdir()] == ["mine.json"]
    assert main(["logs", "--name", "yours"]) == ExitCode.UNREACHABLE
    monkeypatch.setenv("EXPERTMESH_NAME", "yours")
    assert main(["logs"]) == ExitCode.UNREACHABLE


def test_logs_of_processes_on_any_host(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.open_admin()
    gateway.admin = [(200, {"number": 3, "lines": ["one", "two", "three"]})]
    assert main(["--url", gateway.url, "logs", "expert-0", "--tail", "2"]) == ExitCode.OK
    assert capsys.readouterr().out == "two\nthree\n"
    assert gateway.admin_paths == ["/admin/v1/log?process=expert-0&after=0"]

    names = ["controller", "attention-0", "expert-0"]
    gateway.admin = [(200, {"number": 1, "lines": [f"from {name}"]}) for name in names]
    assert main(["--url", gateway.url, "logs", "--all", "--json"]) == ExitCode.OK
    found = json.loads(capsys.readouterr().out)["logs"]
    assert found == [{"process": name, "lines": [f"from {name}"]} for name in names]


def test_a_worker_that_starts_hides_no_other_logs(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.open_admin()
    refusal = (404, {"error": {"message": "no worker 'attention-0' runs"}})
    answers: list[tuple[int, Any]] = [(200, {"number": 1, "lines": [text]}) for text in "ab"]
    gateway.admin = [answers[0], refusal, answers[1]]
    assert main(["--url", gateway.url, "logs", "--all"]) == ExitCode.OK
    shown = capsys.readouterr()
    assert shown.out == "==> controller <==\na\n==> expert-0 <==\nb\n"
    assert shown.err == "expertmesh: attention-0: no worker 'attention-0' runs\n"


def test_logs_of_processes_go_on(
    gateway: FakeGateway,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gateway.open_admin()
    refusal = (404, {"error": {"message": "no worker 'expert-0' runs"}})
    lines: list[tuple[int, Any]] = [(200, {"number": n, "lines": [f"{n}"]}) for n in (1, 2)]
    gateway.admin = [lines[0], refusal, lines[1]]
    interrupt_without_answers(gateway, monkeypatch)
    words = ["--url", gateway.url, "logs", "expert-0", "--follow"]
    assert main(words) == ExitCode.INTERRUPTED
    assert capsys.readouterr().out == "1\n2\n"
    assert [path.partition("after=")[2] for path in gateway.admin_paths] == ["0", "1", "1"]


def test_the_first_lines_of_a_restarted_process_are_shown(
    gateway: FakeGateway,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gateway.open_admin()
    texts = ((3, "abc"), (2, ""), (2, "de"), (3, "f"))
    gateway.admin = [(200, {"number": number, "lines": [*text]}) for number, text in texts]
    interrupt_without_answers(gateway, monkeypatch)
    words = ["--url", gateway.url, "logs", "controller", "--follow"]
    assert main(words) == ExitCode.INTERRUPTED
    assert capsys.readouterr().out.split() == ["a", "b", "c", "d", "e", "f"]
    assert [path.partition("after=")[2] for path in gateway.admin_paths] == ["0", "3", "0", "2"]


@pytest.mark.parametrize("process", ["--all", "expert-0"])
def test_following_outlives_errors_and_says_each_once(
    gateway: FakeGateway,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    process: str,
) -> None:
    gateway.open_admin()
    number = 3 if process == "--all" else 1
    good, bad = (200, {"number": 1, "lines": ["one"]}), (503, {"error": {"message": "away"}})
    gateway.admin = [good] * number
    status = gateway.status
    pauses = iter(range(5))

    def wait(seconds: float) -> None:
        match next(pauses):
            case 0 | 1:
                gateway.status, gateway.admin = bad, [bad] * number
            case 2:
                gateway.status, gateway.admin = status, [good] * number
            case 3:
                gateway.status, gateway.admin = bad, [bad] * number
            case _:
                raise KeyboardInterrupt

    monkeypatch.setattr(logs, "time", SimpleNamespace(sleep=wait))
    words = ["--url", gateway.url, "logs", process, "--follow"]
    assert main(words) == ExitCode.INTERRUPTED
    shown = capsys.readouterr()
    assert shown.out.count("one\n") == 2 * number
    assert shown.err == "expertmesh: away; trying on\n" * 2


@pytest.mark.parametrize("processes", [["attention-0"], ["controller", "attention-0"]])
def test_following_ends_when_the_output_cannot_be_written(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, processes: list[str]
) -> None:
    gateway.open_admin()

    def fail(lines: Any) -> None:
        raise CommandError(ExitCode.FAILED, "the output cannot be written")

    def wait(seconds: float) -> None:
        if not gateway.admin:
            raise KeyboardInterrupt
        monkeypatch.setattr(logs, "_print_lines", fail)

    monkeypatch.setattr(logs, "time", SimpleNamespace(sleep=wait))
    words = ["--url", gateway.url, "logs", *processes, "--follow"]
    gateway.admin = [(200, {"number": 1, "lines": ["1"]})] * (len(processes) + 1)
    assert main(words) == ExitCode.FAILED


def test_logs_and_down_say_which_clusters_run(
    state_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("alpha", "beta"):
        state_file.write_record(replace(record(name), host=host_id()))
        state_file.log_path(name).write_text(f"of {name}\n")
    assert main(["logs"]) == ExitCode.USAGE
    assert "several clusters run on this host: alpha (http" in capsys.readouterr().err
    assert main(["down"]) == ExitCode.OK
    assert "no cluster called default is up on this host; running: alpha" in capsys.readouterr().err
    state_file.remove_record("beta")
    assert main(["logs"]) == ExitCode.OK
    assert capsys.readouterr().out == "of alpha\n"
