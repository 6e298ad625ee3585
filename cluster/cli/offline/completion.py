"""``completion``: prints a shell script that completes commands and options."""

from __future__ import annotations

import argparse

from cluster.cli.terminal.arguments import CommandParsers
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.cli.terminal.output import write_result

SHELLS = ("bash", "zsh", "tcsh")
_DESCRIPTION = """\
bash: expertmesh completion bash > ~/.local/share/bash-completion/completions/expertmesh
zsh:  expertmesh completion zsh > "${fpath[1]}/_expertmesh\""""


def add_commands(commands: CommandParsers) -> None:
    parser = commands.add(
        "completion", run, "print a shell script that completes commands and options"
    )
    parser.add_argument("shell", choices=SHELLS, help="Shell to make the script for")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _DESCRIPTION


def run(args: argparse.Namespace) -> int:
    """Print the script for all commands."""
    import shtab  # imported here to keep other commands fast

    for action in args.whole._actions:
        if action.help == argparse.SUPPRESS:  # the help lists the commands by heading instead
            action.help = None
    write_result(f"{shtab.complete(args.whole, args.shell)}\n")
    return ExitCode.OK
