"""Look for known holes in the pinned packages: ``make audit``, and after the tests in CI.

Standard library only. pip-audit gets an environment of its own, as it is no part of expertmesh.
Exit status 1 only when a hole is known. Without the network, or when the advisory service does not
answer, it says so in one line and succeeds: nobody's tests depend on a service elsewhere.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import venv
from collections.abc import Collection, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "pip-audit>=2.10,<3"
LIMIT_S = 90.0
IGNORED: dict[str, str] = {}
"""Advisories that do not concern us: id, and why."""


class UnreachableError(Exception):
    """The advisories cannot be had; the text says why."""


def say(text: str) -> None:
    """One line to whoever reads the log."""
    sys.stderr.write(f"expertmesh audit: {text}\n")
    sys.stderr.flush()


def call(command: Sequence[str], what: str) -> subprocess.CompletedProcess[str]:
    """Run a command within its time. Raises ``UnreachableError``."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired as err:
        raise UnreachableError(f"{what} took more than {LIMIT_S:g} s") from err
    except OSError as err:
        raise UnreachableError(f"{what}: {err}") from err


def install(folder: Path) -> Path:
    """pip-audit in an environment of its own; its Python. Raises ``UnreachableError``."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    options = ["--quiet", "--disable-pip-version-check", "--retries", "0", "--timeout", "10"]
    done = call([str(python), "-m", "pip", "install", *options, PACKAGE], "installing pip-audit")
    if done.returncode:
        raise UnreachableError(f"pip-audit cannot be installed: {last_line(done.stderr)}")
    return python


def audit(python: Path, requirements: Path) -> list[str]:
    """A line for each hole that is known. Raises ``UnreachableError``."""
    options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json"]
    command = [str(python), "-m", "pip_audit", "--requirement", str(requirements), *options]
    done = call(command, "asking for advisories")
    return read_report(done.stdout, done.stderr)


def read_report(stdout: str, stderr: str, ignored: Collection[str] = IGNORED.keys()) -> list[str]:
    """The holes in pip-audit's report. Raises ``UnreachableError`` if it is none."""
    try:
        packages = json.loads(stdout)["dependencies"]
    except (ValueError, KeyError, TypeError) as err:
        raise UnreachableError(f"no report from pip-audit: {last_line(stderr)}") from err
    return [
        f"{package['name']} {package['version']}: {hole['id']}, "
        f"repaired in {', '.join(hole['fix_versions']) or 'no version yet'}"
        for package in packages
        for hole in package.get("vulns", ())
        if not {hole["id"], *hole.get("aliases", ())} & set(ignored)
    ]


def last_line(text: str) -> str:
    """What a command said at its end."""
    return (text.strip().splitlines() or ["no word"])[-1][:300]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; its exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-audit")
    parser.add_argument("--requirements", type=Path, default=ROOT / "constraints.txt")
    options = parser.parse_args(arguments)
    try:
        holes = audit(install(options.venv), options.requirements)
    except UnreachableError as err:
        say(f"skipped, {err}")
        return 0
    for hole in holes:
        say(hole)
    say(f"{len(holes)} known holes in {options.requirements.name}")
    return 1 if holes else 0


if __name__ == "__main__":
    sys.exit(main())
