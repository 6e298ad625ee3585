"""Make the virtual environment: ``make setup`` and ``make test`` run this with a system Python.

Standard library only. uv installs the packages of requirements/, where each file has a hash
(``make lock`` writes them), and pip does where uv is not available. Without an NVIDIA GPU, torch is
the CPU build. A stamp file is written last, so that a failed run is started over.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from installer import (
    LOCKS,
    ROOT,
    digest,
    find_installer,
    find_torch,
    guarded,
    make_venv,
    run,
    say,
)
from kernels import build_kernels


def install(extra: str, venv: Path, cpu_index: str) -> None:
    """Install what serving (``run``) or everything (``test``) needs. Raises ``SetupError``."""
    installer = find_installer(make_venv(venv))
    locked = (LOCKS / f"{extra}.txt").read_text()
    pin = re.findall(r"^torch==[\d.]+", locked, re.M)[0]
    build, *options = find_torch(installer, pin, cpu_index)
    say(f"installing {len(re.findall('^[^ #]+==', locked, re.M))} packages, {build} among them")
    # uv compares hashes only where the pin names the build.
    chosen = venv / "requirements.txt"
    chosen.write_text(locked.replace(pin, build))
    log = venv / "setup.log"
    run([*installer, "--no-deps", *options, "--requirement", str(chosen)], log)
    run([*installer, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)], log)
    build_kernels(venv)


def install_once(extra: str, venv: Path, cpu_index: str) -> None:
    """Install unless the stamp of a finished run is there. Raises ``SetupError``."""
    inputs = [ROOT / "pyproject.toml", *sorted(LOCKS.glob("*.txt"))]
    stamps = [
        venv / f".stamp-{name}" for name in (("run", "test") if extra == "test" else ("run",))
    ]
    if not stamps[-1].exists() or stamps[-1].read_text() != digest(*inputs):
        started = time.monotonic()
        install(extra, venv, cpu_index)
        say(f"ready after {time.monotonic() - started:.0f} s")
    for stamp in stamps:
        stamp.write_text(digest(*inputs))


def main() -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(description="Make the virtual environment.")
    parser.add_argument("extra", choices=("run", "test"))
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--torch-cpu-index", required=True)
    args = parser.parse_args()
    return guarded(lambda: install_once(args.extra, args.venv.absolute(), args.torch_cpu_index))


if __name__ == "__main__":
    sys.exit(main())
