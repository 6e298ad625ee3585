"""``version``: what is installed."""

from __future__ import annotations

import argparse
import platform
from importlib import metadata
from typing import Any

from cluster.cli.exit_codes import ExitCode
from cluster.cli.terminal import out_json, out_line

PACKAGES = ("ray", "torch", "grpcio", "fastapi")


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register ``version``."""
    parser = commands.add_parser("version", parents=[common], help="show versions")
    parser.set_defaults(run=run)


def versions() -> dict[str, str | None]:
    """Installed version by package; None where it is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def own_version() -> str:
    """expertmesh's own version."""
    try:
        return metadata.version("expertmesh")
    except metadata.PackageNotFoundError:  # run from the source tree
        return "0+unknown"


def run(args: argparse.Namespace) -> int:
    """Print the versions."""
    if args.json:
        out_json({"schema": 1, "version": own_version(), **versions()})
    else:
        out_line(f"expertmesh {own_version()}")
        for name, number in versions().items():
            out_line(f"{name} {number or 'missing'}")
    return ExitCode.OK
