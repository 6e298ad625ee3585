from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import tomllib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cluster.cli import entry
from cluster.cli.main import main
from cluster.cli.offline.doctor import examine_kernels, kernels_finding
from cluster.cli.offline.finding import Finding
from cluster.cli.terminal.client import response_error
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.core.process import count_cpus
from cluster.core.release import RELEASE
from cluster.launch import state_file
from cluster.launch.orphans import host_id, identify
from tests.cluster.cli.fake_gateway import EVENTS, PARTIAL, PLACEMENT, STATUS, FakeGateway
from tests.cluster.launch.test_state_file import record
from tests.paths import ROOT
from workers.native.library import LibraryChoice

pytestmark = [pytest.mark.usefixtures("state_home"), pytest.mark.heavy]


def chunk(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}], "usage": None}


def error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "t", "param": None, "code": "c"}}


def test_status_of_a_ready_cluster(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--url", gateway.url, "status"]) == ExitCode.OK
    text = capsys.readouterr().out
    assert "SERVING" in text
    assert "10 of 12 KV blocks free" in text
    assert "32 expert slots" in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("results", "line"),
    [
        ({"exact": True, "arithmetic": "float32 12ab", "reason": ""}, "exact, with float32 12ab"),
        ({"exact": False, "arithmetic": "", "reason": "a GPU"}, "not exact: a GPU"),
    ],
)
def test_status_says_whether_results_are_exact(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], results: dict[str, Any], line: str
) -> None:
    gateway.status = (200, {**STATUS, "results": results})
    assert main(["--url", gateway.url, "status"]) == ExitCode.OK
    assert f"results     {line}\n" in capsys.readouterr().out


def test_status_says_what_autoscaling_wants(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted, reason = {"attention": 2, "expert": 3}, "expert: slot time 85%, target 60%, over 30 s"
    found = {"mode": "on", "wanted": wanted, "reason": reason, "waits_for": "scale-1.1 runs"}
    gateway.status = (200, {**STATUS, "autoscale": found})
    assert main(["--url", gateway.url, "status"]) == ExitCode.OK
    line = f"autoscale   on: wants 2 attention and 3 expert workers ({reason}); waits: scale-1.1"
    assert line in capsys.readouterr().out
    gateway.status = (200, {**STATUS, "autoscale": {**found, "mode": "off"}})
    assert main(["--url", gateway.url, "status"]) == ExitCode.OK
    assert "autoscale" not in capsys.readouterr().out


def test_status_lists_adapters(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    found = [{"name": "sql", "state": "READY"}, {"name": "chat", "state": "UNLOADING"}]
    gateway.status = (200, {**STATUS, "adapters": found})
    assert main(["--url", gateway.url, "status"]) == ExitCode.OK
    assert "adapters    sql (READY), chat (UNLOADING)\n" in capsys.readouterr().out


def test_status_json_is_the_document_alone(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--json", "--url", gateway.url]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == STATUS


def test_status_fails_while_not_ready(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.ready = (503, {"ready": False, "reasons": ["loading"]})
    status = {**STATUS, "state": "STARTING", "error": "slow disk", "problems": ["no room"]}
    gateway.status = (200, status)
    assert main(["--url", gateway.url, "status"]) == ExitCode.NOT_READY
    output = capsys.readouterr()
    assert "slow disk" in output.out
    assert "no room" in output.out
    assert output.err == "not ready; loading\n"


def test_the_url_comes_from_the_environment(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EXPERTMESH_URL", f"{gateway.url}/")
    assert main(["workers", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["schema"] == 1


def test_a_key_is_sent(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["--url", gateway.url, "--api-key", "k1", "workers"])
    monkeypatch.setenv("EXPERTMESH_API_KEY", "k2")
    main(["--url", gateway.url, "workers"])
    assert gateway.keys == ["Bearer k1", "Bearer k2"]


@pytest.mark.parametrize(
    ("status", "code"), [(401, 6), (403, 6), (503, 4), (429, 4), (409, 5), (500, 1)]
)
def test_refusals_become_exit_codes(
    gateway: FakeGateway, status: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.status = (status, error("says why"))
    assert main(["--url", gateway.url, "workers"]) == code
    hints = {
        401: " (--api-key or EXPERTMESH_API_KEY gives it)",
        403: " (--admin-key or EXPERTMESH_ADMIN_KEY gives it)",
    }
    assert capsys.readouterr().err == f"expertmesh: says why{hints.get(status, '')}\n"


def test_no_server_there(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:  # bound, so that nobody listens there
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert main(["--url", url, "status"]) == ExitCode.UNREACHABLE
    assert capsys.readouterr().err.startswith(f"expertmesh: cannot reach {url}")


def test_a_slow_server_times_out(gateway: FakeGateway) -> None:
    gateway.delay_s = 5.0
    assert main(["--url", gateway.url, "--timeout", "0.1", "status"]) == ExitCode.NOT_READY


@pytest.mark.parametrize(
    "url",
    ["localhost", "localhost:8000", "ftp://a", "file:///x", "http://", "http://a:b", "http://["],
)
def test_a_url_that_is_none(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", url, "status"]) == ExitCode.USAGE
    assert main(["--admin-url", url, "--url", "http://127.0.0.1:1", "rebalance"]) == ExitCode.USAGE
    assert capsys.readouterr().err.count(f"({url}) must be a URL of http or https") == 2


def test_an_unknown_cluster_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--name", "other", "status"]) == ExitCode.UNREACHABLE
    assert "no cluster called other runs on this host; running: none" in capsys.readouterr().err


def test_one_of_several_clusters_must_be_chosen(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    me = identify(os.getpid())
    assert me is not None
    alive = replace(record("serve-1"), launcher=me, host=host_id(), http=gateway.url)
    state_file.write_record(alive)
    assert main(["status"]) == ExitCode.OK
    state_file.write_record(replace(alive, name="serve-2", http="http://127.0.0.1:2"))
    assert main(["status"]) == ExitCode.USAGE
    running = f"serve-1 ({gateway.url}), serve-2 (http://127.0.0.1:2)"
    error = f"several clusters run on this host: {running}; choose one with --name\n"
    assert capsys.readouterr().err.endswith(error)
    assert main(["--name", "serve-1", "status"]) == ExitCode.OK


def test_ctrl_c_while_modules_are_imported_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting(ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise KeyboardInterrupt

    monkeypatch.setitem(sys.modules, "cluster.cli.main", Interrupting("cluster.cli.main"))
    assert entry.main() == ExitCode.INTERRUPTED


@pytest.mark.parametrize("name", ["cluster/__init__.py", "workers/__init__.py", "gateway.py"])
def test_a_package_that_hides_ours_is_named(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.touch()
    monkeypatch.chdir(tmp_path)
    assert entry.main() == ExitCode.USAGE
    assert capsys.readouterr().err.startswith(f"expertmesh: {file.resolve()} hides the package")


def test_a_folder_that_is_no_package_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "workers").mkdir()
    monkeypatch.chdir(tmp_path)
    assert entry.find_shadow(ROOT) == ""


def test_the_installed_command_is_the_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["expertmesh"] == "cluster.cli.entry:main"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == ExitCode.OK
    assert capsys.readouterr().out == f"expertmesh {RELEASE}\n"


def test_a_cluster_that_is_starting_is_not_unreachable(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    state_file.write_record(replace(record("mine"), state="starting", http=url))
    assert main(["--url", url, "status"]) == ExitCode.NOT_READY
    assert "cluster mine is starting" in capsys.readouterr().err


_CUT = "HTTP/1.1 {} X\r\nContent-Length: 99\r\n\r\n{{}}"
_WHOLE = "HTTP/1.1 200 X\r\n\r\n"


@pytest.mark.parametrize(
    ("words", "reply", "message"),
    [
        (["status"], "\0\0\x18\4 HTTP/2, as gRPC has it\r\n", "does not answer like an exp"),
        (["status"], f"{_WHOLE}[1]", "does not answer like an exp"),
        (["status"], _WHOLE + "[" * 9999, "does not answer like an exp"),
        (["tokenize", "a"], f"{_WHOLE}[1]", "does not answer like an exp"),
        (["generate", "a"], f"{_WHOLE}data: [1]\n\n", "does not answer like an exp"),
        (["tokenize", "a"], _WHOLE + "{}", "an expertmesh gateway: no field"),
        (["workers"], _WHOLE + "{}", "an expertmesh gateway: no field workers"),
        (["events"], _WHOLE + "{}", "an expertmesh gateway: no field events"),
        (["placement"], _WHOLE + "{}", "an expertmesh gateway: no field"),
        (["load"], _WHOLE + "{}", "an expertmesh gateway: no field"),
        (["status"], _CUT.format(200), "ended before it was complete"),
        (["status"], _CUT.format(500), "ended before it was complete"),
        (
            ["generate", "a"],
            'HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n99\r\ndata: {"ch',
            "ended before it was complete",
        ),
    ],
)
def test_a_broken_response_takes_one_line(
    words: list[str], reply: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def answer() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(reply.encode("latin-1"))
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):  # unread data would reset the connection
                pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = threading.Thread(target=answer)
        server.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        assert main(["--url", url, *words]) == ExitCode.UNREACHABLE
        server.join()
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_an_error_that_is_no_json_is_shown_as_text() -> None:
    assert str(response_error(500, b"[" * 9999)) == "[" * 200


def test_lost_workers_have_a_reason(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = {**STATUS["workers"][1], "state": "LOST", "reason": "its process died"}
    gateway.status = (200, {**STATUS, "workers": [STATUS["workers"][0], lost]})
    assert main(["--url", gateway.url, "workers"]) == ExitCode.OK
    _, attention, blank, header, gone = capsys.readouterr().out.splitlines()
    assert attention.startswith("attention-0")
    assert (blank, header.split()) == ("", ["GONE", "STATE", "NODE", "REASON"])
    assert gone.split() == ["expert-0", "LOST", "here", "its", "process", "died"]


def test_events_table(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", gateway.url, "events"]) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["TIME", "GENERATION", "CAUSE", "EFFECT"]
    assert lines[1].startswith(time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(1e9)))
    assert lines[2].split()[2:] == ["2", "lost", "expert-1:", "killed", "go", "on"]
    assert main(["--url", gateway.url, "events", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == EVENTS


def test_workers_table(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", gateway.url, "workers"]) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["NAME", "ROLE", "RANK", "STATE", "NODE", "PID", "THREADS", "HOLDS"]
    assert [line.split()[0] for line in lines[1:]] == ["attention-0", "expert-0"]
    assert lines[1].split()[5:8] == ["11", "2", "10"]
    assert lines[2].split()[5:8] == ["12", "-", "32"], "an expert worker that has not loaded yet"


def test_placement_of_one_layer(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", gateway.url, "placement", "--layer", "1"]) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["1", "mlp", "expert-0", "0*", "1", "-"]
    assert lines[2].split()[3:] == ["2", "3", "0*"]
    assert lines[3:] == ["", "12*: expert 12, which has other copies. -: an empty slot."]
    assert main(["--url", gateway.url, "placement", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == PLACEMENT


def test_placement_shades_experts_by_load_on_a_terminal(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    shades = {}
    for words in ([], ["--no-color"]):
        assert main(["--url", gateway.url, *words, "placement", "--layer", "0"]) == ExitCode.OK
        shades[bool(words)] = re.findall(r"48;5;(\d+)m(\d+\*?)", capsys.readouterr().out)
    assert shades[True] == []
    ground = {name: int(shade) for shade, name in shades[False]}
    assert ground == {"0*": 18, "1": 236, "2": 236, "3": 38}, "of the tokens of a copy"


def test_placement_of_a_layer_without_experts(gateway: FakeGateway) -> None:
    assert main(["--url", gateway.url, "placement", "--layer", "9"]) == ExitCode.REFUSED


def test_generate_streams_text(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 2}
    gateway.events = [chunk("to "), chunk("be", "length"), {"choices": [], "usage": usage}]
    words = [
        "generate",
        "Whether",
        "--max-tokens",
        "2",
        "--seed",
        "3",
        "--stop",
        "a",
        "--stop",
        "b",
    ]
    assert main(["--url", gateway.url, *words]) == ExitCode.OK
    assert capsys.readouterr().out == "to be\n"
    body = gateway.bodies[0]
    assert (body["prompt"], body["max_tokens"], body["seed"]) == ("Whether", 2, 3)
    assert body["stop"] == ["a", "b"]
    assert "temperature" not in body


def test_generate_json(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 2}
    gateway.events = [chunk("x"), chunk("y", "stop"), {"choices": [], "usage": usage}]
    assert main(["--url", gateway.url, "generate", "a", "--json"]) == ExitCode.OK
    document = json.loads(capsys.readouterr().out)
    assert document == {"schema": 1, "text": "xy", "finish_reason": "stop", "usage": usage}


def test_generate_reads_stdin(gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    gateway.events = [chunk("x", "stop")]
    assert main(["--url", gateway.url, "generate", "-"]) == ExitCode.OK
    assert gateway.bodies[0]["prompt"] == "from a pipe"


def test_generate_needs_a_prompt(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--url", gateway.url, "generate", ""]) == ExitCode.USAGE
    assert "the prompt is empty" in capsys.readouterr().err
    assert gateway.bodies == []


def test_generate_reports_an_error_in_the_stream(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.events = [chunk("x"), error("worker lost")]
    assert main(["--url", gateway.url, "generate", "a"]) == ExitCode.FAILED
    assert capsys.readouterr().err == "expertmesh: worker lost\n"


def test_generate_notices_a_cut_stream(gateway: FakeGateway) -> None:
    gateway.events = [chunk("x")]
    assert main(["--url", gateway.url, "generate", "a"]) == ExitCode.FAILED


def test_down_without_a_cluster_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["down", "-y", "--json"]) == ExitCode.OK
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"schema": 1, "name": "default", "was_up": False}
    assert "no cluster called default" in captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version", "--json"]) == ExitCode.OK
    document = json.loads(capsys.readouterr().out)
    assert document["schema"] == 1
    assert document["ray"]
    assert main(["version"]) == ExitCode.OK
    assert capsys.readouterr().out.startswith("expertmesh ")


def test_doctor_looks_at_everything(state_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == ExitCode.OK
    findings = {f["what"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
    process = {"python", "packages", "model", "permissions", "leftovers", "ports"}
    system = {"cpu", "kernels", "huge pages", "memory", "shm", "disk", "threads", "open files"}
    assert set(findings) == process | system | {"gpu", "nccl"}
    assert findings["python"]["verdict"] == "ok"
    assert f"{count_cpus()} in the only worker of --mode local" in findings["cpu"]["text"]
    assert str(state_home) in findings["permissions"]["text"]


def test_doctor_warns_of_a_host_without_kernels() -> None:
    """Torch computes there: it is no reason to fail."""
    found = kernels_finding(LibraryChoice(None, "no compiler"))
    assert found == Finding(what="kernels", verdict="warn", text="torch (no compiler)")


def test_doctor_names_instructions_that_do_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTMESH_MAX_INSTRUCTIONS", "avx9")
    found = examine_kernels()
    rule = "EXPERTMESH_MAX_INSTRUCTIONS 'avx9' must be one of avx512_bf16, avx512, avx2"
    assert (found.verdict, found.text) == ("bad", rule)


def test_reading_commands_import_neither_ray_nor_torch() -> None:
    code = (
        "import sys, cluster.cli.main; "
        "print([m for m in ('ray', 'torch', 'fastapi', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("command", ["load", "placement"])
def test_numbers_by_expert_need_the_admin_key(
    gateway: FakeGateway, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.operator_key = "root"
    words = ["--url", gateway.url, "--api-key", "user", command, "--json"]
    assert main(words) == ExitCode.UNAUTHORISED
    output = capsys.readouterr()
    assert output.out == ""
    assert "this needs an admin key" in output.err
    for more in (["--admin-key", "root"], ["--api-key", "", "--admin-key", "root"]):
        assert main([*more, *words]) == ExitCode.OK
        assert json.loads(capsys.readouterr().out)["banks"]


def test_the_status_is_partial_with_the_key_of_a_client(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.operator_key = "root"
    words = ["--url", gateway.url, "--api-key", "user"]
    for command in ("status", "workers"):
        assert main([*words, command]) in (ExitCode.OK, ExitCode.NOT_READY)
        output = capsys.readouterr()
        assert "expert-0" in output.out
        assert "give --admin-key" in output.err
        assert main([*words, "--admin-key", "root", command]) in (ExitCode.OK, ExitCode.NOT_READY)
        assert "give --admin-key" not in capsys.readouterr().err
    assert main([*words, "--admin-key", "other", "workers", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["workers"] == PARTIAL["workers"]
    for lacking in (["health", "--node", "here"], ["drain", "worker", "expert-0"]):
        assert main([*words, *lacking]) == ExitCode.UNAUTHORISED
        assert "to admin keys only: give --admin-key" in capsys.readouterr().err
