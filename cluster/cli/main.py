"""Entry point ``expertmesh``: parses the command line and maps every outcome to an exit code."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence

from cluster.cli.bench import serve as bench
from cluster.cli.cluster import (
    down,
    drain,
    health,
    info,
    logs,
    node,
    operations,
    scale,
    serve,
    top,
)
from cluster.cli.cluster.launcher_process import Interrupted
from cluster.cli.experts import load, placement, rebalance
from cluster.cli.models import chat, generate, inspection, revisions, run_batch, tokenize
from cluster.cli.offline import completion, config, doctor, plan, version
from cluster.cli.options.serve_options import (
    add_missing_values,
    unknown_variables,
    with_typed_names,
)
from cluster.cli.terminal.arguments import CommandParsers, seconds
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import discard_stdout, note
from cluster.cli.terminal.parser import Parser
from cluster.core.errors import ConfigError
from cluster.core.release import RELEASE

_DESCRIPTION = "Expert-parallel serving of mixture-of-experts language models."
_GROUPS = {
    "cluster": (serve, down, node, info, health, top, logs, scale, drain, operations),
    "experts": (placement, load, rebalance),
    "models": (generate, chat, run_batch, tokenize, inspection, revisions),
    "offline": (plan, config, doctor, version, completion),
    "measuring": (bench,),
}
"""Modules that register commands, by the heading under which the help lists them."""


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of all commands. Global options may stand before or after the command."""
    parser = Parser(
        prog="expertmesh",
        usage="%(prog)s [OPTION ...] COMMAND ...",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[_common(None, False)],
    )
    subparsers = parser.add_subparsers(
        metavar="COMMAND", required=True, prog="expertmesh", help=argparse.SUPPRESS
    )
    common = _common(argparse.SUPPRESS, argparse.SUPPRESS)
    lines = [_DESCRIPTION]
    for heading, modules in _GROUPS.items():
        commands = CommandParsers(subparsers, common)
        for module in modules:
            module.add_commands(commands)
        lines += [f"\n{heading}:", *commands.lines]
    parser.add_argument("--version", action="version", version=f"expertmesh {RELEASE}")
    parser.description = "\n".join(lines)
    parser.set_defaults(whole=parser)
    return parser


def _common(absent: object, off: object) -> argparse.ArgumentParser:
    """Make a parser with the options that every command has.

    ``absent`` and ``off`` are the defaults of options and switches. The parsers of commands get
    ``SUPPRESS``, so that they keep a value that was given before the command.
    """
    common = argparse.ArgumentParser(add_help=False)
    options = common.add_argument_group("everywhere")
    for flag, metavar, text in (
        ("--url", "URL", "URL of the gateway (EXPERTMESH_URL, default: the cluster on this host)"),
        ("--admin-url", "URL", "URL of the admin port (EXPERTMESH_ADMIN_URL)"),
        ("--name", "NAME", "Name of the cluster on this host (EXPERTMESH_NAME, default: default)"),
        ("--api-key", "KEY", "API key that is sent to the gateway (EXPERTMESH_API_KEY)"),
        ("--admin-key", "KEY", "API key that is sent to the admin port (EXPERTMESH_ADMIN_KEY)"),
        ("--ca-cert", "FILE", "PEM file of trusted certificate authorities (EXPERTMESH_CA_CERT)"),
        ("--client-cert", "FILE", "PEM certificate for mutual TLS (EXPERTMESH_CLIENT_CERT)"),
        ("--client-key", "FILE", "PEM private key of --client-cert (EXPERTMESH_CLIENT_KEY)"),
    ):
        options.add_argument(flag, default=absent, metavar=metavar, help=text)
    text = "Time limit of one HTTP or gRPC call (default: each command has its own)"
    options.add_argument("--timeout", type=seconds, default=absent, metavar="SECONDS", help=text)
    for flags, text in (
        (["--json"], "Print the result as one JSON document on stdout"),
        (["--no-color"], "Print no colours (NO_COLOR)"),
        (["-v", "--verbose"], "Print more messages on stderr"),
    ):
        options.add_argument(*flags, action="store_true", default=off, help=text)
    return common


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = make_parser().parse_args(add_missing_values(sys.argv[1:] if argv is None else argv))
    for line in unknown_variables(os.environ):
        note(f"expertmesh: warning: {line}")
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING)
    try:
        return int(args.run(args))
    except CommandError as err:
        note(f"expertmesh: {with_typed_names(str(err), args, os.environ)}")
        return err.code
    except ConfigError as err:
        note(f"expertmesh: {with_typed_names(str(err), args, os.environ)}")
        return ExitCode.USAGE
    except (KeyboardInterrupt, Interrupted):
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # the reader of the output has ended: write nothing more, not even at exit
        discard_stdout()
        return 128 + signal.SIGPIPE


if __name__ == "__main__":
    sys.exit(main())
