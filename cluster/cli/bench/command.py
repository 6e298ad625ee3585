"""``bench``: registers the commands below it."""

from __future__ import annotations

from cluster.cli.bench import compare, serve
from cluster.cli.terminal.arguments import Commands


def add_commands(commands: Commands) -> None:
    kinds = commands.add_group("bench", "measure a server")
    for kind in (serve, compare):
        kind.add_command(kinds)
