"""The scripts behind ``make setup``: which Python, which torch, what the user sees."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet

from tests.paths import ROOT
from tests.project.scripts import load_script

SHELL = "/bin/sh"


setup: Any = load_script("setup")


def fake_python(folder: Path, name: str, version: str, has_venv: bool = True) -> None:
    """A program that answers the questions of find-python.sh."""
    is_old = tuple(map(int, version.split("."))) < (3, 11)
    script = f"""#!/bin/sh
case "$2" in
  *print*) echo {version} ;;
  *exit*) exit {int(is_old)} ;;
  *ensurepip*) exit {int(not has_venv)} ;;
esac
"""
    path = folder / name
    path.write_text(script)
    path.chmod(0o755)


def find_python(folder: Path) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / ".ci" / "find-python.sh")
    environment = {"PATH": str(folder)}
    return subprocess.run([SHELL, script], env=environment, capture_output=True, text=True)


def test_the_first_python_that_fits_is_taken(tmp_path: Path) -> None:
    fake_python(tmp_path, "python3.13", "3.13", has_venv=False)
    fake_python(tmp_path, "python3.12", "3.12")
    fake_python(tmp_path, "python3", "3.9")
    assert find_python(tmp_path).stdout == f"{tmp_path}/python3.12\n"


def test_every_pinned_package_runs_on_the_oldest_python() -> None:
    """Else pip seeks another version, against the pin, for minutes."""
    for package in distributions():
        python = str(package.metadata.json.get("requires_python", ""))
        assert "3.11.0" in SpecifierSet(python), package.metadata["Name"]


def test_too_old_a_python_gives_one_line(tmp_path: Path) -> None:
    fake_python(tmp_path, "python3", "3.9")
    done = find_python(tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        "expertmesh setup: python3 is Python 3.9: Python 3.11 or newer is needed\n"
    )


def test_a_python_without_venv_gives_one_line(tmp_path: Path) -> None:
    fake_python(tmp_path, "python3.11", "3.11", has_venv=False)
    fake_python(tmp_path, "python3", "3.9")
    done = find_python(tmp_path)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "apt install python3.11-venv" in done.stderr


def test_no_python_at_all_gives_one_line(tmp_path: Path) -> None:
    done = find_python(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("expertmesh setup: no Python was found")
    assert done.stderr.count("\n") == 1


@contextlib.contextmanager
def index(body: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Keep the tests' output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_index_answers_when_it_lists_wheels() -> None:
    with index(b'<a href="torch-2.13.0+cpu-cp311-linux.whl">') as url:
        assert setup.index_answers(url, 60.0)
    with index(b"<html>sign in to this network</html>") as url:
        assert not setup.index_answers(url, 60.0)


def test_a_silent_index_is_given_up_in_time() -> None:
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        began = time.monotonic()
        assert not setup.index_answers(f"http://127.0.0.1:{server.getsockname()[1]}", 0.3)
        assert time.monotonic() - began < 60.0


def find_torch(*, has_gpu: bool = False, answers: bool | None = None, url: str = "") -> Any:
    """The source of torch; an index whose answer is None must not be asked."""

    def ask() -> bool:
        assert answers is not None, "asked"
        return answers

    return setup.find_torch(
        "https://index", "torch==1", has_gpu=has_gpu, answers=ask, resolve=lambda: url
    )


def test_torch_comes_from_the_cpu_index_in_a_call_of_its_own() -> None:
    source = find_torch(answers=True)
    assert source.pip_args == ("--no-deps", "--index-url", "https://index", "torch==1")
    assert "CPU" in source.words


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///wheels/torch-1+cpu.whl", "wheel on this machine"),
        ("https://host/torch-1-cp311.whl", "default build"),
        ("https://host/torch-1%2Bcpu-cp311.whl", "CPU build"),
        ("", "the build that pip finds"),
    ],
)
def test_without_that_index_pip_decides(url: str, words: str) -> None:
    source = find_torch(answers=False, url=url)
    assert source.pip_args is None
    assert source.words.startswith(words)
    assert (source.megabytes == 0) == (not url.startswith("https:"))


def test_with_a_gpu_the_index_is_not_asked() -> None:
    assert find_torch(has_gpu=True).pip_args is None


def test_a_failed_installation_shows_the_log_and_leaves_no_stamp(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || { echo no such package; exit 1; }\n')
    python.chmod(0o755)
    with pytest.raises(setup.SetupError, match="no such package\npip failed"):
        setup.install_once("run", tmp_path, "http://127.0.0.1:1")
    assert not list(tmp_path.glob(".stamp*"))
    assert "downloading about" in capsys.readouterr().err


def build_python(folder: Path, body: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def test_kernels_are_built_by_the_compiler_of_the_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = build_python(tmp_path, "echo native avx2")
    setup.build_kernels([str(python), "-m", "pip"], tmp_path)
    assert capsys.readouterr().err == "expertmesh setup: kernels: native avx2\n"


def test_without_a_compiler_another_one_is_there_for_the_build_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup.platform, "machine", lambda: "x86_64")
    venv = tmp_path / "venv"
    venv.mkdir()
    python = build_python(
        tmp_path,
        """
        if [ "$2" = pip ]; then
            while [ "$1" != --target ]; do shift; done; touch "$2/compiler"; exit 0
        fi
        [ -e "$PYTHONPATH/compiler" ] && { echo native avx512; exit 0; }
        echo "torch (no compiler)"; exit 1
        """,
    )
    setup.build_kernels([str(python), "-m", "pip"], venv)
    assert "kernels: native avx512\n" in capsys.readouterr().err
    assert [path.name for path in venv.iterdir()] == ["setup.log"]
    build_python(tmp_path, 'echo "torch (no compiler)"; exit 1')
    setup.build_kernels([str(python), "-m", "pip"], venv)
    assert capsys.readouterr().err.endswith("expertmesh setup: kernels: torch (no compiler)\n")


def fake_npm(folder: Path, status: int) -> None:
    path = folder / "npm"
    path.write_text(f"#!/bin/sh\necho no such package >&2\nexit {status}\n")
    path.chmod(0o755)


def test_the_clients_get_the_npm_packages_of_every_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_npm(tmp_path, 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    setup.install_npm(tmp_path)
    wanted = json.loads((tmp_path / "package.json").read_text())["dependencies"]
    assert {"ai", "openai", "@grpc/grpc-js"} <= set(wanted)
    assert all(re.fullmatch(r"[0-9.]+", version) for version in wanted.values())


def test_without_npm_or_with_a_failed_one_the_user_reads_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(setup.SetupError, match=r"npm was not found: Node\.js 20"):
        setup.install_npm(tmp_path)
    fake_npm(tmp_path, 1)
    with pytest.raises(setup.SetupError, match="no such package\nnpm failed"):
        setup.install_npm(tmp_path)


def test_progress_comes_as_lines_without_a_terminal(tmp_path: Path) -> None:
    lines: list[str] = []
    end = tmp_path / "end"

    def tell(line: str) -> None:
        lines.append(line)
        if "fetched" in line:
            end.touch()  # pip ends once its line was printed

    script = f"""
import os, time
print("Downloading a-1.whl", flush=True)
while not os.path.exists({str(end)!r}):
    time.sleep(0.01)
"""
    setup.run_pip([sys.executable, "-c", script], [], tmp_path, tell, 0.1)
    assert re.fullmatch(r"installing, \d+ s, 1 packages fetched, last a", lines[-1])


@pytest.mark.parametrize(("extra", "fewest"), [("test", 20), ("clients", 8)])
def test_every_requirement_is_pinned_once(extra: str, fewest: int) -> None:
    lines = setup.inputs(extra)[1].read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins)
    names = [re.sub(r"[-_.]+", "-", pin.partition("==")[0]).lower() for pin in pins]
    assert len(names) == len(set(names))
    wanted = setup.requirements(extra)
    assert len(wanted) > fewest
    bare = {re.split(r"[^A-Za-z0-9._-]", requirement)[0] for requirement in wanted}
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in bare} - set(names) == set()


def test_make_says_what_it_can_do() -> None:
    done = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "make serve" in done.stdout
    environment = {**os.environ, "MAKEFLAGS": ""}
    dry = subprocess.run(
        ["make", "-C", str(ROOT), "--dry-run", "serve", "ARGS=--port 1"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert "expertmesh serve --port 1" in dry.stdout


def fake_program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!{SHELL}\n{script}\n")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH, but for what shell scripts need."""
    folder = tmp_path / "programs"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_prometheus_comes_out_of_its_debian_package(tmp_path: Path, programs: Path) -> None:
    fake_program(programs, "apt-get", "echo the package > prometheus_1.0_amd64.deb")
    unpack = (
        'set -e; read what < "$2"; /bin/mkdir -p "$3/usr/bin"; for n in prometheus promtool; do'
    )
    fake_program(programs, "dpkg-deb", f'{unpack} echo "$n of $what" > "$3/usr/bin/$n"; done')
    into = tmp_path / "bin"
    into.mkdir()
    setup.install_prometheus(into)
    found = {path.name: path.read_text() for path in into.iterdir()}
    assert found == {n: f"{n} of the package\n" for n in ("prometheus", "promtool")}


def test_an_installed_prometheus_is_taken(tmp_path: Path, programs: Path) -> None:
    for name in ("prometheus", "promtool"):
        fake_program(programs, name, "")
    setup.install_prometheus(tmp_path / "nowhere")


MISSING = "prometheus and promtool are missing: install them"
PACKAGE = "echo the package > prometheus_{}_amd64.deb"


def test_without_apt_the_user_reads_what_is_missing(
    tmp_path: Path, programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup.install_prometheus(tmp_path / "nowhere")
    assert "prometheus and promtool are not on PATH: install them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("apt", "dpkg", "why"),
    [
        ("echo no such host >&2; exit 100", "", "no such host\napt-get .*run apt-get update"),
        ("", "", "apt-get left 0 packages"),
        (f"{PACKAGE.format(1)}; {PACKAGE.format(2)}", "", "apt-get left 2 packages"),
        (PACKAGE.format(1), "exit 2", "dpkg-deb .*failed"),
        (PACKAGE.format(1), "", "prometheus_1_amd64.deb has no prometheus and no promtool"),
    ],
    ids=["offline", "no package", "two packages", "a broken package", "another package"],
)
def test_where_apt_has_no_package_the_setup_goes_on(
    tmp_path: Path,
    programs: Path,
    capsys: pytest.CaptureFixture[str],
    apt: str,
    dpkg: str,
    why: str,
) -> None:
    fake_program(programs, "apt-get", apt)
    fake_program(programs, "dpkg-deb", dpkg)
    setup.install_prometheus(tmp_path / "nowhere")
    shown = capsys.readouterr().err
    assert re.search(why, shown), shown
    assert MISSING in shown


FAKE_PIP = """
import json, sys
if "-c" in sys.argv:
    code = sys.argv[sys.argv.index("-c") + 1]
    sys.argv = ["-c", *sys.argv[sys.argv.index("-c") + 2 :]]
    exec(code)
else:
    info = {"download_info": {"url": "https://host/vllm.whl"}}
    print(json.dumps({"install": [info]}))
"""


def fake_pip(folder: Path, wheel: Path | None) -> list[str]:
    """A pip that finds vLLM's wheel, and can read it in part or not at all."""
    network = folder / "pip" / "_internal" / "network"
    network.mkdir(parents=True)
    opened = "(_ for _ in ()).throw(OSError('no such host'))" if wheel is None else "open(_, 'rb')"
    (network / "lazy_wheel.py").write_text(
        f"def LazyZipOverHTTP(url, session):\n    _ = {str(wheel)!r}\n    return {opened}\n"
    )
    (network / "session.py").write_text("PipSession = object\n")
    for package in (network, network.parent, network.parent.parent):
        (package / "__init__.py").touch()
    program = folder / "python"
    (folder / "fake.py").write_text(FAKE_PIP)
    program.write_text(
        f'#!/bin/sh\nPYTHONPATH={folder} exec {sys.executable} {folder}/fake.py "$@"\n'
    )
    program.chmod(0o755)
    return [str(program), "-m", "pip"]


def test_one_module_is_taken_out_of_vllm_s_wheel(tmp_path: Path) -> None:
    wheel = tmp_path / "vllm.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(setup.VLLM_MODULE, "class KVEventBatch: ...")
        archive.writestr("vllm/other.py", "")
    setup.install_vllm_module(fake_pip(tmp_path / "pip", wheel), tmp_path / "venv")
    found = [path for path in (tmp_path / "venv").rglob("*") if path.is_file()]
    assert found == [tmp_path / "venv" / "vllm-module" / setup.VLLM_MODULE]
    assert found[0].read_text() == "class KVEventBatch: ..."


def test_without_vllm_s_wheel_the_setup_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    setup.install_vllm_module(fake_pip(tmp_path / "pip", None), tmp_path / "venv")
    shown = capsys.readouterr().err
    assert "cannot be taken, its test is skipped" in shown
    assert "no such host" in shown
