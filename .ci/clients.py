"""Make the environment of the programs that tests/conformance drives against a server.

That is ``make setup-clients``: packages of Python and npm, Prometheus, and one module of vLLM.
Standard library only.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from installer import (
    LOG_LINES_ON_FAILURE,
    ROOT,
    SetupError,
    digest,
    find_installer,
    find_torch,
    guarded,
    make_venv,
    run,
    say,
)

CLIENTS = ROOT / "tests" / "conformance" / "clients"
REQUIREMENTS, CONSTRAINTS = CLIENTS / "requirements.txt", CLIENTS / "constraints.txt"
NODE_PACKAGES = (CLIENTS / "package.json", ROOT / "docs" / "node-client" / "package.json")
PROMETHEUS = ("prometheus", "promtool")
PROMETHEUS_MB = 20
PROMETHEUS_BY_HAND = "install them, and put them on PATH, for the tests of alerts"
VLLM = "vllm==0.33.0"
VLLM_MODULE = "vllm/distributed/kv_events.py"
ERROR_CHARACTERS = 400


def install(venv: Path, cpu_index: str) -> None:
    """Install all clients. Raises ``SetupError``."""
    python = make_venv(venv)
    installer, log = find_installer(python), venv / "setup.log"
    pin = re.findall(r"^torch==[\d.]+", CONSTRAINTS.read_text(), re.M)[0]
    run([*installer, "--no-deps", *find_torch(installer, pin, cpu_index)], log)
    run([*installer, "--constraint", str(CONSTRAINTS), "--requirement", str(REQUIREMENTS)], log)
    install_npm(venv)
    install_prometheus(venv / "bin")
    install_vllm_module([str(python), "-m", "pip"], venv)


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

    Nothing is installed on the machine, and root's rights are not needed. Where there is no apt, or
    apt has no package (offline, or with old lists), Prometheus must be installed by hand, and until
    then its tests are skipped.
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


def wheel_url(pip: Sequence[str], requirement: str) -> str:
    """The URL of the wheel that pip would install, empty where pip finds none."""
    command = [*pip, "install", "--quiet", "--dry-run", "--no-deps", "--report", "-", requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return str(json.loads(done.stdout)["install"][0]["download_info"]["url"])
    except (subprocess.SubprocessError, ValueError, LookupError):
        return ""


def install_vllm_module(pip: Sequence[str], venv: Path) -> None:
    """Take one module out of vLLM's published wheel, which pip reads in part; all of it, with what
    it needs, would be gigabytes. Where that cannot be, its test is skipped.
    """
    url = wheel_url(pip, VLLM)
    target = venv / "vllm-module" / VLLM_MODULE
    command = [pip[0], "-c", _TAKE_MODULE, url, VLLM_MODULE, str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip()[-ERROR_CHARACTERS:]
        say(f"{VLLM_MODULE} of {VLLM} cannot be taken, its test is skipped: {reason}")


def _run(command: Sequence[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        last = "\n".join(done.stderr.splitlines()[-LOG_LINES_ON_FAILURE:])
        hint = " (run apt-get update first)" if command[0] == "apt-get" else ""
        raise SetupError(f"{last}\n{' '.join(command)} failed, see above{hint}")


def main() -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(description="Make the environment of the clients.")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-clients")
    parser.add_argument("--torch-cpu-index", required=True)
    args = parser.parse_args()
    venv = args.venv.absolute()

    def install_once() -> None:
        inputs = [REQUIREMENTS, CONSTRAINTS, *NODE_PACKAGES, Path(__file__)]
        stamp = venv / ".stamp-clients"
        if not stamp.exists() or stamp.read_text() != digest(*inputs):
            install(venv, args.torch_cpu_index)
        stamp.write_text(digest(*inputs))

    return guarded(install_once)


if __name__ == "__main__":
    sys.exit(main())
