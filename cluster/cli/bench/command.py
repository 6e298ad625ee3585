"""``bench``: registers the commands below it."""

from __future__ import annotations

import argparse
from typing import Any

from cluster.cli.bench import compare, dispatch, engine, profile, serve


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register ``bench`` and what can be measured."""
    parser = commands.add_parser("bench", help="measure a server, the engine, the data plane")
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    for kind in (serve, engine, dispatch, profile, compare):
        kind.add_command(kinds, common)
