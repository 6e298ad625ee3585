"""Entry point ``expertmesh``: parses the command line and maps every end to an exit code."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Sequence

from cluster.cli import (
    chat,
    cluster_info,
    doctor,
    down,
    drain,
    generate,
    health,
    inspection,
    load,
    logs,
    node,
    plan,
    rebalance,
    scale,
    serve,
    settings,
    tokenize,
    top,
    version,
)
from cluster.cli.bench import command as bench
from cluster.cli.exit_codes import CommandError, ExitCode
from cluster.cli.front import Interrupted
from cluster.cli.terminal import note
from cluster.errors import ConfigError


def make_parser() -> argparse.ArgumentParser:
    """The whole command line. Global options are accepted before and after the command."""
    parser = argparse.ArgumentParser(
        prog="expertmesh",
        description="Expert-parallel serving of mixture-of-experts language models.",
        parents=[_common(None, False)],
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    common = _common(argparse.SUPPRESS, argparse.SUPPRESS)
    for group in (
        serve,
        down,
        node,
        cluster_info,
        top,
        logs,
        load,
        drain,
        rebalance,
        scale,
        health,
        generate,
        chat,
        tokenize,
        inspection,
        plan,
        settings,
        bench,
        doctor,
        version,
    ):
        group.add_commands(commands, common)
    return parser


def _common(absent: object, off: object) -> argparse.ArgumentParser:
    """Options that every command takes. A second set must not overwrite what the first has set."""
    common = argparse.ArgumentParser(add_help=False)
    options = common.add_argument_group("everywhere")
    options.add_argument("--url", default=absent, help="gateway to talk to (EXPERTMESH_URL)")
    options.add_argument(
        "--admin-url", default=absent, help="its admin port, if need be (EXPERTMESH_ADMIN_URL)"
    )
    options.add_argument("--name", default=absent, help="cluster on this host (default)")
    options.add_argument(
        "--api-key", default=absent, metavar="KEY", help="key (EXPERTMESH_API_KEY)"
    )
    options.add_argument(
        "--admin-key", default=absent, metavar="KEY", help="admin key (EXPERTMESH_ADMIN_KEY)"
    )
    options.add_argument(
        "--ca-cert", default=absent, metavar="F", help="who signed https (EXPERTMESH_CA_CERT)"
    )
    for name in ("cert", "key"):
        variable = f"EXPERTMESH_CLIENT_{name.upper()}"
        options.add_argument(
            f"--client-{name}", default=absent, metavar="F", help=f"for mutual TLS ({variable})"
        )
    options.add_argument("--json", action="store_true", default=off, help="one JSON document")
    options.add_argument("--timeout", type=_seconds, default=absent, metavar="S", help="limit")
    options.add_argument("--no-color", action="store_true", default=off, help="plain text")
    options.add_argument("-v", "--verbose", action="store_true", default=off, help="say more")
    return common


def _seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING)
    try:
        return int(args.run(args))
    except CommandError as err:
        note(f"expertmesh: {err}")
        return err.code
    except ConfigError as err:
        note(f"expertmesh: {err}")
        return ExitCode.USAGE
    except (KeyboardInterrupt, Interrupted):
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        _silence_stdout()
        return 128 + signal.SIGPIPE


def _silence_stdout() -> None:
    """The reader of our output is gone: nothing more to say, not even at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
