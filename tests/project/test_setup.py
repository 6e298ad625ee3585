"""The scripts behind ``make setup``: which Python, which torch, what the user sees."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from tests.paths import ROOT
from tests.project.scripts import load_script

SHELL = "/bin/sh"


setup: Any = load_script("setup")
installer: Any = sys.modules["installer"]
kernels: Any = sys.modules["kernels"]
clients: Any = load_script("clients")


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


def test_uv_gets_the_settings_of_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("SSL_CERT_FILE", "ALL_PROXY"):
        monkeypatch.setenv(variable, "")  # what is set here is restored at the end
        monkeypatch.delenv(variable)
    config = """\
:env:.find-links='/wheels /more'
global.cert='/cert.pem'
global.constraint='/constraints.txt'
global.find-links='/overridden'
global.index-url='https://global/simple'
install.index-url='https://install/simple'
install.extra-index-url='https://a/simple\\nhttps://b/simple'
install.trusted-host='a'
"""
    assert installer.uv_options(config) == [
        *("--default-index", "https://install/simple"),
        *("--index", "https://a/simple", "--index", "https://b/simple"),
        *("--find-links", "/wheels", "--find-links", "/more"),
        *("--constraint", "/constraints.txt"),
        *("--allow-insecure-host", "a"),
    ]
    assert os.environ["SSL_CERT_FILE"] == "/cert.pem"
    assert installer.uv_options("global.no-index='1'") == ["--no-index"]


def fake_environment(folder: Path, body: str) -> Path:
    """A Python whose pip and uv run ``body``, a shell script."""
    for name in ("python", "uv"):
        fake_program(folder, name, body)
    return folder / "python"


def test_pip_installs_where_uv_is_not_available(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    python = fake_environment(tmp_path, "exit 1")
    command = installer.find_installer(python)
    assert command[1:] == ["-m", "pip", "--disable-pip-version-check", "install"]
    assert "uv is not available here" in capsys.readouterr().err
    python = fake_environment(
        tmp_path, '[ "$5" = list ] && echo "global.find-links=\'/wheels\'"; exit 0'
    )
    command = installer.find_installer(python)
    assert command[0] == str(tmp_path / "uv")
    assert command[-2:] == ["--find-links", "/wheels"]


CPU_INDEX = "https://cpu/index"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have one build of torch")
@pytest.mark.parametrize(
    ("has_gpu", "succeeds_with", "expected"),
    [
        (False, "", ["torch==1+cpu"]),
        (False, CPU_INDEX, ["torch==1+cpu", "--extra-index-url", CPU_INDEX]),
        (False, "nothing", ["torch==1", "--requirement", str(ROOT / "requirements/cuda.txt")]),
        (True, "", ["torch==1", "--requirement", str(ROOT / "requirements/cuda.txt")]),
    ],
    ids=["where the others are", "the index of PyTorch", "the default build", "GPU"],
)
def test_torch_is_the_cpu_build_where_there_is_no_gpu(
    programs: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    has_gpu: bool,
    succeeds_with: str,
    expected: list[str],
) -> None:
    monkeypatch.setattr(installer, "GPU_DEVICE", programs / "nvidia0")
    if has_gpu:
        (programs / "nvidia0").touch()
    fake_program(programs, "uv", f'case "$*" in *"{succeeds_with}"*) exit 0 ;; esac; exit 1')
    assert installer.find_torch([str(programs / "uv")], "torch==1", CPU_INDEX) == expected


def test_a_silent_index_is_given_up_in_time(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "INDEX_TIMEOUT_S", 0.2)
    monkeypatch.setattr(installer, "GPU_DEVICE", programs / "nvidia0")
    fake_program(programs, "uv", "exec /bin/sleep 60")
    assert installer.find_torch([str(programs / "uv")], "torch==1", CPU_INDEX)[0] == "torch==1"


def test_a_failed_installation_shows_the_log_and_leaves_no_stamp(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    fake_program(tmp_path / "bin", "python", '[ "$1" = -c ] || { echo no such package; exit 1; }')
    with pytest.raises(installer.SetupError, match="no such package\nthe installation failed"):
        setup.install_once("run", tmp_path, CPU_INDEX)
    assert not list(tmp_path.glob(".stamp*"))
    assert "installing " in capsys.readouterr().err


def locked(name: str) -> dict[str, list[str]]:
    """The pins of a file of requirements/, each with its hashes."""
    text = (ROOT / "requirements" / name).read_text().partition("\n")[2]
    entries = [entry.split(" \\\n") for entry in re.split(r"\n(?=\S)", text.strip())]
    return {entry[0].partition(" ")[0]: entry[1:] for entry in entries}


@pytest.mark.parametrize("name", ["run.txt", "test.txt", "cuda.txt", "uv.txt"])
def test_every_locked_package_has_hashes(name: str) -> None:
    entries = locked(name)
    for pin, hashes in entries.items():
        assert re.fullmatch(r"[a-z0-9._-]+(\[[a-z,-]+\])?==[a-z0-9.]+", pin), pin
        assert hashes, pin
        assert all(re.fullmatch(r" +--hash=sha256:[0-9a-f]{64}", line) for line in hashes), pin
    assert "://" not in (ROOT / "requirements" / name).read_text()


@pytest.mark.parametrize(("name", "extras"), [("run.txt", ()), ("test.txt", ("test", "docs"))])
def test_the_lock_has_what_the_project_asks_for(name: str, extras: tuple[str, ...]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    optional = project["project"]["optional-dependencies"]
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for extra in extras:
        wanted += optional[extra]
    versions = dict(re.sub(r"\[.*\]", "", pin).split("==") for pin in locked(name))
    for requirement in map(Requirement, wanted):
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier
    pinned = dict(line.split("==") for line in constraints(ROOT / "constraints.txt"))
    pinned = {canonicalize_name(package): version for package, version in pinned.items()}
    assert {k: pinned[k] for k in versions if k in pinned} == {
        k: versions[k] for k in versions if k in pinned
    }


def test_the_lock_has_torch_for_cpu_and_for_cuda() -> None:
    lock = load_script("lock")
    for name in ("run.txt", "test.txt"):
        hashes = [
            line.strip()
            for line in next(v for k, v in locked(name).items() if k.startswith("torch=="))
        ]
        cpu = {f"--hash=sha256:{sha256}" for sha256 in lock.TORCH_CPU.values()}
        assert cpu < set(hashes)
        assert not [pin for pin in locked(name) if pin.startswith("nvidia-")]
    assert any(pin.startswith("nvidia-nccl") for pin in locked("cuda.txt"))


def test_kernels_are_built_by_the_compiler_of_the_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    fake_program(tmp_path / "bin", "python", "echo native avx2")
    kernels.build_kernels(tmp_path)
    assert capsys.readouterr().err == "expertmesh setup: kernels: native avx2\n"


def test_without_a_compiler_another_one_is_there_for_the_build_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels.platform, "machine", lambda: "x86_64")
    (tmp_path / "bin").mkdir()
    fake_program(
        tmp_path / "bin",
        "python",
        """
        if [ "$2" = pip ]; then
            while [ "$1" != --target ]; do shift; done; touch "$2/compiler"; exit 0
        fi
        [ -e "$PYTHONPATH/compiler" ] && { echo native avx512; exit 0; }
        echo "torch (no compiler)"; exit 1
        """,
    )
    kernels.build_kernels(tmp_path)
    assert "kernels: native avx512\n" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "setup.log"}
    fake_program(tmp_path / "bin", "python", 'echo "torch (no compiler)"; exit 1')
    kernels.build_kernels(tmp_path)
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
    clients.install_npm(tmp_path)
    wanted = json.loads((tmp_path / "package.json").read_text())["dependencies"]
    assert {"ai", "openai", "@grpc/grpc-js"} <= set(wanted)
    assert all(re.fullmatch(r"[0-9.]+", version) for version in wanted.values())


def test_without_npm_or_with_a_failed_one_the_user_reads_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(installer.SetupError, match=r"npm was not found: Node\.js 20"):
        clients.install_npm(tmp_path)
    fake_npm(tmp_path, 1)
    with pytest.raises(installer.SetupError, match="no such package\nnpm failed"):
        clients.install_npm(tmp_path)


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
    installer.run([sys.executable, "-c", script], tmp_path / "log", tell, 0.1)
    assert re.fullmatch(r"installing, \d+ s, 1 packages fetched, last a", lines[-1])


def constraints(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize(
    "path", [ROOT / "constraints.txt", clients.CONSTRAINTS], ids=["ours", "clients"]
)
def test_every_package_is_pinned_once(path: Path) -> None:
    pins = constraints(path)
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins)
    names = [canonicalize_name(pin.partition("==")[0]) for pin in pins]
    assert len(names) == len(set(names))


def test_every_client_is_pinned() -> None:
    names = {canonicalize_name(pin.partition("==")[0]) for pin in constraints(clients.CONSTRAINTS)}
    lines = [line.partition("#")[0] for line in clients.REQUIREMENTS.read_text().splitlines()]
    wanted = {canonicalize_name(Requirement(line).name) for line in lines if line.strip()}
    assert len(wanted) > 8
    assert wanted <= names


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


def test_prometheus_comes_out_of_its_debian_package(tmp_path: Path, programs: Path) -> None:
    fake_program(programs, "apt-get", "echo the package > prometheus_1.0_amd64.deb")
    unpack = (
        'set -e; read what < "$2"; /bin/mkdir -p "$3/usr/bin"; for n in prometheus promtool; do'
    )
    fake_program(programs, "dpkg-deb", f'{unpack} echo "$n of $what" > "$3/usr/bin/$n"; done')
    into = tmp_path / "bin"
    into.mkdir()
    clients.install_prometheus(into)
    found = {path.name: path.read_text() for path in into.iterdir()}
    assert found == {n: f"{n} of the package\n" for n in ("prometheus", "promtool")}


def test_an_installed_prometheus_is_taken(tmp_path: Path, programs: Path) -> None:
    for name in ("prometheus", "promtool"):
        fake_program(programs, name, "")
    clients.install_prometheus(tmp_path / "nowhere")


MISSING = "prometheus and promtool are missing: install them"
PACKAGE = "echo the package > prometheus_{}_amd64.deb"


def test_without_apt_the_user_reads_what_is_missing(
    tmp_path: Path, programs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clients.install_prometheus(tmp_path / "nowhere")
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
    clients.install_prometheus(tmp_path / "nowhere")
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
        archive.writestr(clients.VLLM_MODULE, "class KVEventBatch: ...")
        archive.writestr("vllm/other.py", "")
    clients.install_vllm_module(fake_pip(tmp_path / "pip", wheel), tmp_path / "venv")
    found = [path for path in (tmp_path / "venv").rglob("*") if path.is_file()]
    assert found == [tmp_path / "venv" / "vllm-module" / clients.VLLM_MODULE]
    assert found[0].read_text() == "class KVEventBatch: ..."


def test_without_vllm_s_wheel_the_setup_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clients.install_vllm_module(fake_pip(tmp_path / "pip", None), tmp_path / "venv")
    shown = capsys.readouterr().err
    assert "cannot be taken, its test is skipped" in shown
    assert "no such host" in shown
