"""``operations``: lists, shows, awaits or cancels drains, scales and rebalances of the cluster."""

from __future__ import annotations

import argparse
import math

from cluster.cli.terminal.admin_client import make_admin_client
from cluster.cli.terminal.arguments import (
    CommandParsers,
    add_address_option,
    add_served_model_option,
    add_wait_option,
)
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.cli.terminal.operations import follow_operation, show_operation
from cluster.cli.terminal.output import show, table, time_of_day


def add_commands(commands: CommandParsers) -> None:
    kinds = commands.add_group(
        "operations", "list, show, await or cancel drains, scales and rebalances"
    )
    every = kinds.add("list", run_list, "list the last operations, the newest last")
    get = kinds.add("get", run_get, "show the progress of an operation")
    waiting = kinds.add("wait", run_wait, "show the phases of an operation until it has ended")
    add_wait_option(waiting, math.inf)
    cancel = kinds.add("cancel", run_cancel, "cancel an operation, if it can still be rolled back")
    for parser in (get, waiting, cancel):
        text = "Id of the operation, which drain, scale and rebalance print"
        parser.add_argument("id", metavar="ID", help=text)
    for parser in (every, get, waiting, cancel):
        add_address_option(parser)
        add_served_model_option(parser)


def run_list(args: argparse.Namespace) -> int:
    """Print a line for each recorded operation (drain, scale or rebalance)."""
    with make_admin_client(args) as admin:
        operations = admin.operations()
    rows = [
        (o["id"], o["target"], o["state"], time_of_day(o["started"]), o["message"] or o["phase"])
        for o in operations
    ]
    header = ("ID", "TARGET", "STATE", "STARTED", "PHASE OR END")
    return show(args, {"schema": 1, "operations": operations}, table(header, rows))


def run_get(args: argparse.Namespace) -> int:
    """Print an operation; returns ``FAILED`` if it failed or was cancelled."""
    with make_admin_client(args) as admin:
        return show_operation(args, admin.operation(args.id))


def run_wait(args: argparse.Namespace) -> int:
    """Wait for the end of an operation and print the operation."""
    with make_admin_client(args) as admin:
        return follow_operation(args, admin, admin.operation(args.id), args.wait)


def run_cancel(args: argparse.Namespace) -> int:
    """Cancel an operation. Returns 0 once the operation is cancelled."""
    with make_admin_client(args) as admin:
        show_operation(args, admin.cancel(args.id))
    return ExitCode.OK
