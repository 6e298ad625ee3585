"""Make an environment and install packages into it: with uv, which pip installs, or with pip.

Standard library only.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"
LOG_LINES_ON_FAILURE = 15
# Asking an index whether it has a package.
INDEX_TIMEOUT_S = 20.0
GPU_DEVICE = Path("/dev/nvidia0")
PIP_TO_UV = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraint",
    "trusted-host": "--allow-insecure-host",
}


class SetupError(Exception):
    """The environment cannot be made; the message is for the user."""


def say(text: str) -> None:
    """Write one line to the user; stdout stays free for the ready line of ``make serve``."""
    sys.stderr.write(f"expertmesh setup: {text}\n")
    sys.stderr.flush()


def run(
    command: Sequence[str], log: Path, tell: Callable[[str], None] = say, interval_s: float = 5.0
) -> None:
    """Run an installer. Its own output is shown on a terminal, else a line every few seconds.

    Raises ``SetupError`` with the last lines of the log.
    """
    on_terminal, started = sys.stderr.isatty(), time.monotonic()
    with log.open("wb") as sink:
        output = sys.stderr.fileno() if on_terminal else sink.fileno()
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        while (status := _wait(child, interval_s)) is None:
            if not on_terminal:
                tell(f"installing, {time.monotonic() - started:.0f} s{_last_package(log)}")
    except BaseException:
        child.terminate()
        raise
    if status != 0:
        lines = [] if on_terminal else log.read_text(errors="replace").splitlines()
        text = "\n".join([*lines[-LOG_LINES_ON_FAILURE:], "the installation failed, see above"])
        raise SetupError(text)


def _wait(child: subprocess.Popen[bytes], timeout_s: float) -> int | None:
    try:
        return child.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return None


def _last_package(log: Path) -> str:
    lines = r"^\s*(?:Download(?:ed|ing)|Using cached) ([\w.]+)"
    names = dict.fromkeys(re.findall(lines, log.read_text(errors="replace"), re.M))
    return f", {len(names)} packages fetched, last {list(names)[-1]}" if names else ""


def make_venv(venv: Path) -> Path:
    """Create the environment unless a working one is there, and return its Python."""
    python = venv / "bin" / "python"
    probe = [str(python), "-c", "import pip, sys; sys.exit(sys.version_info < (3, 11))"]
    if not python.exists() or subprocess.run(probe, capture_output=True).returncode != 0:
        say(f"making {venv.name} with Python {sys.version.split()[0]}")
        command = [sys.executable, "-m", "venv", "--clear", str(venv)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SetupError(f"{' '.join(command)} failed: {done.stdout}{done.stderr}".strip())
    return python


def uv_options(pip_config: str) -> list[str]:
    """uv's options for the output of ``pip config list``, since uv does not read pip's files.

    As in pip, a variable of the environment overrides the section of the command, which overrides
    the global one. The certificates and the proxy go to uv by the environment.
    """
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for section, key, value in re.findall(r"^(\S+?)\.([\w-]+)='(.*)'$", pip_config, re.M):
        sections.setdefault(section, {})[key] = value.replace("\\n", " ")
    settings = sections["global"] | sections["install"] | sections[":env:"]
    for key, variable in (("cert", "SSL_CERT_FILE"), ("proxy", "ALL_PROXY")):
        if key in settings:
            os.environ.setdefault(variable, settings[key])
    options = ["--no-index"] if settings.get("no-index") in ("1", "true", "yes") else []
    for key, option in PIP_TO_UV.items():
        for value in settings.get(key, "").split():
            options += [option, value]
    return options


def find_installer(python: Path) -> list[str]:
    """The install command of uv, which pip places into the environment, else of pip."""
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    locked = ["--quiet", "--require-hashes", "--requirement", str(LOCKS / "uv.txt")]
    if subprocess.run([*pip, "install", *locked], capture_output=True).returncode != 0:
        say("uv is not available here: installing with pip, which takes longer")
        return [*pip, "install"]
    config = subprocess.run([*pip, "config", "list"], capture_output=True, text=True).stdout
    uv = [str(python.with_name("uv")), "pip", "install", "--python", str(python)]
    # Any index may have a package's newest version, and the hashes say which files are right.
    return [*uv, "--index-strategy", "unsafe-best-match", *uv_options(config)]


def find_torch(installer: Sequence[str], pin: str, cpu_index: str) -> list[str]:
    """The pin of torch's build, then the options that its installation needs.

    Without a GPU that is the CPU build, from where other packages come from or else from PyTorch's
    index. The default build for Linux needs the CUDA libraries.
    """
    if sys.platform != "linux":
        return [pin]
    if shutil.which("nvidia-smi") is None and not GPU_DEVICE.exists():
        for options in ([], ["--extra-index-url", cpu_index]):
            command = [*installer, "--dry-run", "--no-deps", *options, f"{pin}+cpu"]
            try:
                done = subprocess.run(command, capture_output=True, timeout=INDEX_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                continue
            if done.returncode == 0:
                return [f"{pin}+cpu", *options]
    return [pin, "--requirement", str(LOCKS / "cuda.txt")]


def digest(*inputs: Path) -> str:
    """What the stamp of a finished installation holds."""
    content = hashlib.sha256(str(ROOT).encode())
    for path in inputs:
        content.update(path.read_bytes())
    return content.hexdigest()


def guarded(work: Callable[[], None]) -> int:
    """Run one installation at a time, and turn its failure into an exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    with Path(__file__).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            work()
        except SetupError as err:
            say(str(err))
            return 1
        except KeyboardInterrupt:
            say("interrupted; the next run starts over")
            return 130
    return 0
