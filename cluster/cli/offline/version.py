"""``version``: what is installed."""

from __future__ import annotations

import argparse
import platform

from cluster.cli.terminal.arguments import Commands
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.cli.terminal.output import out_json, out_line
from cluster.core.versions import installed_version, own_version

PACKAGES = ("ray", "torch", "grpcio", "fastapi")


def add_commands(commands: Commands) -> None:
    commands.add("version", run, "show versions")


def versions() -> dict[str, str | None]:
    """Installed version by package; None where it is missing."""
    installed = {name: installed_version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **installed}


def run(args: argparse.Namespace) -> int:
    """Print the versions."""
    if args.json:
        out_json({"schema": 1, "version": own_version(), **versions()})
    else:
        out_line(f"expertmesh {own_version()}")
        for name, number in versions().items():
            out_line(f"{name} {number or 'missing'}")
    return ExitCode.OK
