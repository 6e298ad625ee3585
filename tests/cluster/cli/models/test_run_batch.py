"""``run-batch``."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness.stalls import wait_until
from cluster.cli.main import main
from cluster.cli.models import run_batch
from cluster.cli.terminal.exit_codes import ExitCode
from tests.cluster.batches.files import line, read_lines, write_lines
from tests.cluster.cli.fake_gateway import FakeGateway
from tests.harness.faulty_files import FaultyFiles, FileCall

pytestmark = pytest.mark.usefixtures("state_home")

DONE = {"choices": [{"text": "yes"}]}


def test_a_file_is_answered(
    gateway: FakeGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.documents["/v1/completions"] = DONE
    ids = [f"id-{number}" for number in range(40)]
    write_lines(tmp_path / "in", [line(one) for one in ids])
    words = ["--url", gateway.url, "run-batch", str(tmp_path / "in"), str(tmp_path / "out")]
    assert main([*words, "--json"]) == ExitCode.OK
    found = json.loads(capsys.readouterr().out)
    assert found == {"schema": 1, "total": 40, "completed": 40, "failed": 0}
    answers = read_lines(tmp_path / "out")
    assert sorted(one["custom_id"] for one in answers) == sorted(ids)
    assert {json.dumps(one["response"]["body"]) for one in answers} == {json.dumps(DONE)}
    assert sorted(body["prompt"] for body in gateway.bodies) == sorted(ids)
    assert main(words) == ExitCode.OK
    assert "40 of 40 requests answered" in capsys.readouterr().out
    assert len(gateway.bodies) == 40


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "this key is unknown"}}, "this key is unknown"),
        ({"detail": "log in first"}, '{"detail": "log in first"}'),
        ({"error": "unauthorized"}, '{"error": "unauthorized"}'),
    ],
)
def test_a_rejected_key_ends_the_run(
    gateway: FakeGateway,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    body: dict[str, object],
    message: str,
) -> None:
    """Whether the gateway has rejected it, or a proxy in front of the gateway."""
    gateway.documents["/v1/completions"], gateway.document_status = body, 401
    write_lines(tmp_path / "in", [line("a")])
    words = ["--url", gateway.url, "run-batch", str(tmp_path / "in"), str(tmp_path / "out")]
    assert main(words) == ExitCode.UNAUTHORISED
    assert f"expertmesh: {message}\n" in capsys.readouterr().err


def test_a_killed_run_goes_on(gateway: FakeGateway, tmp_path: Path) -> None:
    gateway.documents["/v1/completions"] = DONE
    ids = [f"id-{number}" for number in range(400)]
    write_lines(tmp_path / "in", [line(one) for one in ids])
    out = tmp_path / "out"
    words = ["--url", gateway.url, "run-batch", str(tmp_path / "in"), str(out)]
    command = [sys.executable, "-m", "cluster.cli.main", *words, "--concurrency", "2"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: out.exists() and out.read_bytes().count(b"\n") > 20)
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    before = out.read_bytes()
    num_before = before.count(b"\n")
    assert num_before < len(ids)
    with out.open("ab") as file:  # as a kill within a write, or a full disk, leaves it
        file.write(b'{"id": "batch_req_39')
    assert main(words) == ExitCode.OK
    assert out.read_bytes().startswith(before[: before.rindex(b"\n") + 1])
    assert sorted(one["custom_id"] for one in read_lines(out)) == sorted(ids)
    asked = [body["prompt"] for body in gateway.bodies]
    assert len(asked) <= len(ids) + 2  # those that ran at the kill


def test_a_full_disk_ends_the_run_with_whole_answers(
    gateway: FakeGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.documents["/v1/completions"] = DONE
    ids = [f"id-{number}" for number in range(40)]
    write_lines(tmp_path / "in", [line(one) for one in ids])
    out, words = tmp_path / "out", ["--url", gateway.url, "run-batch"]
    words += [str(tmp_path / "in"), str(out), "--concurrency", "2"]
    num_writes = 0

    def fill(call: FileCall) -> None:
        nonlocal num_writes
        num_writes += call.name == "write"
        if num_writes > 10 and call.name == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with FaultyFiles(tmp_path, on_call=fill):
        assert main(words) == ExitCode.FAILED
        assert f"{out}: No space left on device" in capsys.readouterr().err
        num_asked = len(gateway.bodies)
        assert main(words) == ExitCode.FAILED
    assert len(gateway.bodies) == num_asked, "nothing is asked while there is no room"
    num_before = len(read_lines(out))
    assert num_before > 5
    assert main(words) == ExitCode.OK
    assert sorted(one["custom_id"] for one in read_lines(out)) == sorted(ids)
    assert len(gateway.bodies) == num_asked + len(ids) - num_before


def test_what_cannot_be_run_is_refused(
    gateway: FakeGateway, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--url", gateway.url, "run-batch", str(tmp_path / "in"), str(tmp_path / "out")]
    assert main(words) == ExitCode.FAILED
    assert "in: No such file" in capsys.readouterr().err
    write_lines(tmp_path / "in", [line(url="/v1/x")])
    assert main(words) == ExitCode.USAGE
    assert "line 1: url ('/v1/x') must be one of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    write_lines(tmp_path / "in", [line("a")])
    write_lines(tmp_path / "out", ["notes"])
    assert main(words) == ExitCode.REFUSED
    assert "out: line 1 is no answer" in capsys.readouterr().err
    words[-1] = words[-2]
    (tmp_path / "in").write_text(json.dumps(line("a")))
    assert main(words) == ExitCode.REFUSED
    assert "in: line 1 is no answer" in capsys.readouterr().err
    assert json.loads((tmp_path / "in").read_text()) == line("a")
    assert gateway.bodies == []


def test_a_server_that_is_away(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(tmp_path / "in", [line("a")])
    words = ["--url", "http://127.0.0.1:1", "run-batch", str(tmp_path / "in")]
    words += [str(tmp_path / "out"), "--give-up-after", "0.01"]
    assert main(words) == ExitCode.UNREACHABLE
    assert "0 of 1 requests answered; rerun to send the others" in capsys.readouterr().err


def test_numbers_that_json_cannot_have_are_texts() -> None:
    """The response could not be written to the file."""
    assert run_batch._parsed(b'{"a": [NaN, 1e999, 0.5]}') == {"a": ["NaN", "1e999", 0.5]}
    assert run_batch._parsed(b"[" * 20_000) == "[" * 1024
