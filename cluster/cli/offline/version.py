"""``version``: shows the installed versions."""

from __future__ import annotations

import argparse
import platform

from cluster.cli.terminal.arguments import CommandParsers
from cluster.cli.terminal.output import show
from cluster.core.release import RELEASE, installed_version

PACKAGES = ("ray", "torch", "grpcio", "fastapi")


def add_commands(commands: CommandParsers) -> None:
    commands.add("version", run, "show the installed versions")


def versions() -> dict[str, str | None]:
    """Return the version of Python and each package; None for a package that is not installed."""
    installed = {name: installed_version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **installed}


def run(args: argparse.Namespace) -> int:
    found = versions()
    lines = [f"{n} {v or 'missing'}" for n, v in {"expertmesh": RELEASE, **found}.items()]
    document = {"schema": 1, "version": RELEASE, **found}
    return show(args, document, "\n".join(lines))
