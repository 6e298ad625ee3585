"""Make the virtual environment: ``make setup`` and ``make test`` run this with a system Python.

Standard library only. Installs the pinned packages of constraints.txt with pip, the CPU build of
torch where there is no NVIDIA GPU, and expertmesh itself in editable form. A stamp file is written
last, so that a failed or interrupted run is simply begun again. ``clients`` makes the environment
of the programs that tests/conformance drives against a server, npm packages, Prometheus and one
module of vLLM included.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CLIENTS = ROOT / "tests" / "conformance" / "clients"
NODE_PACKAGES = (CLIENTS / "package.json", ROOT / "docs" / "node-client" / "package.json")
INDEX_TIMEOUT_S = 3.0
# Megabytes of the pinned packages for Linux on x86-64, without torch.
PACKAGES_MB = {"run": 160, "test": 460, "clients": 690}
TORCH_CPU_MB = 190
TORCH_CUDA_MB = 2720
ZIG_MB = 100
PROMETHEUS = ("prometheus", "promtool")
PROMETHEUS_MB = 20
PROMETHEUS_BY_HAND = "install them, and put them on PATH, for the tests of alerts"
VLLM = "vllm==0.33.0"
VLLM_MODULE = "vllm/distributed/kv_events.py"
LOG_LINES_ON_FAILURE = 15
LOG_CHARACTERS = 400


class SetupError(Exception):
    """The environment cannot be made; the text is all that the user is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TorchSource:
    """Where torch comes from."""

    megabytes: int
    """Approximate download, 0 for a wheel on this machine."""
    words: str
    """The build, for people."""
    pip_args: tuple[str, ...] | None
    """Arguments of a pip call of its own; None leaves torch to the call for all packages."""


def say(text: str) -> None:
    """One line to the user; stdout stays free for the ready line of ``make serve``."""
    sys.stderr.write(f"expertmesh setup: {text}\n")
    sys.stderr.flush()


def has_nvidia_gpu() -> bool:
    """Whether the driver shows a device."""
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()


def index_answers(url: str, timeout_s: float) -> bool:
    """Whether the index lists torch within ``timeout_s``, name resolution included."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{url.rstrip('/')}/torch/", timeout=timeout_s) as reply:
                answers.append(b".whl" in reply.read(65536))
        except (OSError, ValueError, urllib.error.URLError):
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return answers == [True]


def find_torch(
    index: str,
    requirement: str,
    *,
    has_gpu: bool,
    answers: Callable[[], bool],
    resolve: Callable[[], str],
) -> TorchSource:
    """Decide between PyTorch's CPU index, if it answers, and the URL that pip resolves."""
    if has_gpu:
        return TorchSource(megabytes=TORCH_CUDA_MB, words="CUDA build", pip_args=None)
    if sys.platform == "linux" and answers():
        args = ("--no-deps", "--index-url", index, requirement)
        return TorchSource(megabytes=TORCH_CPU_MB, words="CPU build", pip_args=args)
    url = resolve()
    if url.startswith("file:"):
        return TorchSource(megabytes=0, words="wheel on this machine", pip_args=None)
    if not url:
        words = f"the build that pip finds: up to {TORCH_CUDA_MB} MB more, none for a local wheel"
        return TorchSource(megabytes=0, words=words, pip_args=None)
    if sys.platform == "linux" and "cpu" not in url:
        words = "default build: PyTorch's CPU index does not answer"
        return TorchSource(megabytes=TORCH_CUDA_MB, words=words, pip_args=None)
    return TorchSource(megabytes=TORCH_CPU_MB, words="CPU build", pip_args=None)


def _resolved_url(pip: Sequence[str], requirement: str) -> str:
    command = [*pip, "install", "--quiet", "--dry-run", "--no-deps", "--report", "-", requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return str(json.loads(done.stdout)["install"][0]["download_info"]["url"])
    except (subprocess.SubprocessError, ValueError, LookupError):
        return ""


def run_pip(
    pip: Sequence[str],
    args: Sequence[str],
    venv: Path,
    tell: Callable[[str], None] = say,
    interval_s: float = 5.0,
) -> None:
    """Install, with pip's own bars on a terminal, else with a line every few seconds.

    Raises ``SetupError`` with the last lines of the log.
    """
    on_terminal = sys.stderr.isatty()
    log = venv / "setup.log"
    command = [*pip, "install", *args]
    with log.open("ab") as sink:
        output = sys.stderr.fileno() if on_terminal else sink.fileno()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            status = child.wait() if on_terminal else _wait(child, log, tell, interval_s)
        except BaseException:
            child.terminate()
            raise
    if status != 0:
        lines = [] if on_terminal else log.read_text(errors="replace").splitlines()
        raise SetupError("\n".join([*lines[-LOG_LINES_ON_FAILURE:], "pip failed, see above"]))


def _wait(
    child: subprocess.Popen[bytes], log: Path, tell: Callable[[str], None], interval_s: float
) -> int:
    started = time.monotonic()
    while True:
        try:
            return child.wait(timeout=interval_s)
        except subprocess.TimeoutExpired:
            tell(f"installing, {time.monotonic() - started:.0f} s{_last_download(log)}")


def _last_download(log: Path) -> str:
    found = re.findall(
        r"^\s*(?:Downloading|Using cached) (\S+)", log.read_text(errors="replace"), re.M
    )
    if not found:
        return ""
    name = str(found[-1]).rsplit("/", 1)[-1].split("-")[0]
    return f", {len(found)} packages fetched, last {name}"


def make_venv(venv: Path) -> Path:
    """Create the environment unless a working one is there; its Python."""
    python = venv / "bin" / "python"
    probe = [str(python), "-c", "import pip, sys; sys.exit(sys.version_info < (3, 11))"]
    if not python.exists() or subprocess.run(probe, capture_output=True).returncode != 0:
        say(f"making {venv.name} with Python {sys.version.split()[0]}")
        command = [sys.executable, "-m", "venv", "--clear", str(venv)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SetupError(f"{' '.join(command)} failed: {done.stdout}{done.stderr}".strip())
    return python


def inputs(extra: str) -> tuple[Path, Path]:
    """The files that name the packages of an environment, and the version of each."""
    if extra == "clients":
        return CLIENTS / "requirements.txt", CLIENTS / "constraints.txt"
    return ROOT / "pyproject.toml", ROOT / "constraints.txt"


def digest(extra: str) -> str:
    """What the stamp of a finished installation holds."""
    more = (*PROMETHEUS, VLLM, VLLM_MODULE) if extra == "clients" else ()
    content = hashlib.sha256(" ".join((extra, str(ROOT), *more)).encode())
    for path in (*inputs(extra), *(NODE_PACKAGES if extra == "clients" else ())):
        content.update(path.read_bytes())
    return content.hexdigest()


def requirements(extra: str) -> list[str]:
    """The packages that pip is asked for, without those that they need."""
    text = inputs(extra)[0].read_text()
    if extra == "clients":
        lines = (line.partition("#")[0].strip() for line in text.splitlines())
        return [line for line in lines if line]
    project = tomllib.loads(text)
    wanted = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    if extra == "test":
        optional = project["project"]["optional-dependencies"]
        wanted += [*optional["test"], *optional["docs"]]
    return wanted


def install(extra: str, venv: Path, index: str) -> None:
    """Bring ``venv`` up to date for ``extra``: ``run``, ``test`` for everything, or ``clients``."""
    pip = [str(make_venv(venv)), "-m", "pip", "--disable-pip-version-check"]
    constraints = inputs(extra)[1]
    pinned = constraints.read_text().split()
    torch = next(line for line in pinned if line.startswith("torch=="))
    source = find_torch(
        index,
        torch,
        has_gpu=has_nvidia_gpu(),
        answers=lambda: index_answers(index, INDEX_TIMEOUT_S),
        resolve=lambda: _resolved_url(pip, torch),
    )
    total = PACKAGES_MB[extra] + source.megabytes
    say(f"downloading about {total} MB; torch: {source.megabytes} MB ({source.words})")
    if source.pip_args is not None:
        run_pip(pip, source.pip_args, venv)
    run_pip(pip, ["--constraint", str(constraints), *requirements(extra)], venv)
    if extra == "clients":
        install_npm(venv)
        install_prometheus(venv / "bin")
        install_vllm_module(pip, venv)
    else:
        run_pip(
            pip, ["--quiet", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)], venv
        )
        build_kernels(pip, venv)


def build_kernels(pip: Sequence[str], venv: Path) -> None:
    """Build the CPU kernels. Where no C compiler can, zig's is there until they are built."""
    build = [pip[0], "-m", "workers.native"]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0 and sys.platform == "linux" and platform.machine() == "x86_64":
        say(f"no working C compiler: taking zig's for the kernels, about {ZIG_MB} MB")
        with tempfile.TemporaryDirectory(dir=venv) as folder:
            wanted = ["--constraint", str(ROOT / "constraints.txt"), "ziglang"]
            try:
                run_pip(pip, ["--quiet", "--no-deps", "--target", folder, *wanted], venv)
            except SetupError as err:
                say(str(err))  # torch computes
            there = {**os.environ, "PYTHONPATH": folder, "ZIG_GLOBAL_CACHE_DIR": f"{folder}/cache"}
            done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, env=there)
    say(f"kernels: {done.stdout.strip() or done.stderr.strip()[-LOG_CHARACTERS:]}")


def install_npm(folder: Path) -> None:
    """Install the npm packages of all clients into ``node_modules`` of a folder."""
    if shutil.which("npm") is None:
        raise SetupError("npm was not found: Node.js 20 or newer is needed for its clients")
    wanted: dict[str, str] = {}
    for path in NODE_PACKAGES:
        wanted |= json.loads(path.read_text())["dependencies"]
    (folder / "package.json").write_text(json.dumps({"private": True, "dependencies": wanted}))
    command = ["npm", "install", "--no-audit", "--no-fund"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        last = "\n".join(done.stderr.splitlines()[-LOG_LINES_ON_FAILURE:])
        raise SetupError(f"{last}\nnpm failed, see above")


def install_prometheus(folder: Path) -> None:
    """Take Prometheus out of Debian's package, unless it is here; no registry of pip or npm has it.

    The machine stays as it is, and nobody needs to be root. Where there is no apt, or apt has no
    package (offline, or with old lists), Prometheus must be installed by hand, and until then its
    tests are skipped.
    """
    if all(shutil.which(name) for name in PROMETHEUS):
        return
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        say(f"prometheus and promtool are not on PATH: {PROMETHEUS_BY_HAND}")
        return
    say(f"taking Prometheus out of its Debian package, about {PROMETHEUS_MB} MB")
    with tempfile.TemporaryDirectory() as text:
        try:
            _unpack_prometheus(Path(text), folder)
        except SetupError as err:
            say(f"{err}\nprometheus and promtool are missing: {PROMETHEUS_BY_HAND}")


def _unpack_prometheus(place: Path, folder: Path) -> None:
    """Download and unpack the package in ``place``, an empty folder; its programs go to ``folder``.

    Raises ``SetupError``.
    """
    place.chmod(0o755)  # apt-get downloads as a user of its own
    _run(["apt-get", "--quiet", "download", "prometheus"], place)
    packages = sorted(place.glob("prometheus_*.deb"))
    if len(packages) != 1:
        raise SetupError(f"apt-get left {len(packages)} packages of Prometheus, not one")
    _run(["dpkg-deb", "--extract", str(packages[0]), str(place)], place)
    found = [place / "usr" / "bin" / name for name in PROMETHEUS]
    if missing := [path.name for path in found if not path.is_file()]:
        raise SetupError(f"{packages[0].name} has no {' and no '.join(missing)}")
    for path in found:
        shutil.move(path, folder / path.name)


_TAKE_MODULE = """
import pathlib, sys, zipfile
from pip._internal.network.lazy_wheel import LazyZipOverHTTP
from pip._internal.network.session import PipSession
url, name, target = sys.argv[1:]
with LazyZipOverHTTP(url, PipSession()) as wheel:
    content = zipfile.ZipFile(wheel).read(name)
path = pathlib.Path(target)
path.parent.mkdir(parents=True, exist_ok=True)
path.write_bytes(content)
"""


def install_vllm_module(pip: Sequence[str], venv: Path) -> None:
    """Take one module out of vLLM's published wheel, which pip reads in part; all of it, with what
    it needs, would be gigabytes. Where that cannot be, its test is skipped.
    """
    url = _resolved_url(pip, VLLM)
    target = venv / "vllm-module" / VLLM_MODULE
    command = [pip[0], "-c", _TAKE_MODULE, url, VLLM_MODULE, str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip()[-LOG_CHARACTERS:]
        say(f"{VLLM_MODULE} of {VLLM} cannot be taken, its test is skipped: {reason}")


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        last = "\n".join(done.stderr.splitlines()[-LOG_LINES_ON_FAILURE:])
        hint = " (run apt-get update first)" if command[0] == "apt-get" else ""
        raise SetupError(f"{last}\n{' '.join(command)} failed, see above{hint}")


def main() -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(description="Make the virtual environment.")
    parser.add_argument("extra", choices=("run", "test", "clients"))
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--torch-cpu-index", required=True)
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    venv = args.venv.absolute()
    with Path(__file__).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two makes at once: the second finds the work done
        try:
            install_once(args.extra, venv, args.torch_cpu_index)
        except SetupError as err:
            say(str(err))
            return 1
        except KeyboardInterrupt:
            say("interrupted; the next run begins again")
            return 130
    return 0


def install_once(extra: str, venv: Path, index: str) -> None:
    """Install unless the stamp of a finished run is there. Raises ``SetupError``."""
    stamp = venv / f".stamp-{extra}"
    if not stamp.exists() or stamp.read_text() != digest(extra):
        stamp.unlink(missing_ok=True)
        started = time.monotonic()
        install(extra, venv, index)
        say(f"ready after {time.monotonic() - started:.0f} s")
    for name in ("run", "test") if extra == "test" else (extra,):
        (venv / f".stamp-{name}").write_text(digest(name))


if __name__ == "__main__":
    sys.exit(main())
