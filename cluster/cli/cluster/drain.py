"""``drain``: moves the work of workers or a gateway elsewhere before they end; no request fails.

The drain of a worker is an operation of the controller. A gateway drains itself: the command polls
its number of requests until there are none.
"""

from __future__ import annotations

import argparse
import time
import uuid
from typing import Any

from cluster.cli.terminal.admin_client import AdminClient, find_admin, make_admin_client
from cluster.cli.terminal.arguments import (
    CommandParsers,
    add_address_option,
    add_served_model_option,
    add_wait_option,
    seconds,
)
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.operations import follow_operation
from cluster.cli.terminal.output import show
from cluster.core.errors import UNDER_WAY, ConflictError

DEFAULT_LIMIT_S = 120.0
_POLL_S = 0.1
_GRACE_S = 10.0
"""Seconds for which the command waits for a drain's end after the drain's deadline."""


def add_commands(commands: CommandParsers) -> None:
    kinds = commands.add_group(
        "drain", "move work away from workers or a gateway; no request fails"
    )
    for what, text in (
        ("worker", "move the requests and experts of a worker to others and end it"),
        ("node", "move the requests and experts of a node's workers to others and end them"),
    ):
        parser = kinds.add(what, run_drain, text)
        text = f"Name of the {what}, as the command workers shows it"
        parser.add_argument("target", metavar="NAME", help=text)
        text = "Time limit of the drain; after it the drain is rolled back and the workers stay"
        parser.add_argument(
            "--deadline", type=seconds, default=DEFAULT_LIMIT_S, metavar="SECONDS", help=text
        )
        text = "At the deadline, end the workers instead of rolling the drain back"
        parser.add_argument("--force", action="store_true", help=text)
        text = "Wait while another operation runs instead of failing; --deadline includes the wait"
        parser.add_argument("--in-turn", action="store_true", help=text)
        add_wait_option(parser, None, "--deadline plus 10")
        add_address_option(parser)
        add_served_model_option(parser)
        parser.set_defaults(what=what)
    text = "take a gateway out of service after it has finished its requests"
    parser = kinds.add("gateway", drain_gateway, text)
    text = "Name of the gateway, as status prints it (default: the gateway of --admin-url)"
    parser.add_argument("gateway", nargs="?", metavar="NAME", help=text)
    add_wait_option(parser, DEFAULT_LIMIT_S)


def run_drain(args: argparse.Namespace) -> int:
    """Start a drain of a worker or node and wait for its end; return the exit code."""
    fields = {
        args.what: args.target,
        "deadline_s": args.deadline,
        "force": args.force,
        "request_id": uuid.uuid4().hex,
    }
    wait_s = args.deadline + _GRACE_S if args.wait is None else args.wait
    with make_admin_client(args) as admin:
        return follow_operation(args, admin, _begin(admin, fields, args.in_turn), wait_s)


def _begin(admin: AdminClient, fields: dict[str, Any], in_turn: bool) -> dict[str, Any]:
    """Start a drain, and return the operation.

    ``in_turn``: wait while another operation runs, because several pods may stop together. Raises
    ``CommandError`` and ``ConflictError``.
    """
    give_up = time.monotonic() + fields["deadline_s"]
    while True:
        try:
            return admin.drain(fields)
        except (CommandError, ConflictError) as err:
            left_s = give_up - time.monotonic() - _POLL_S
            if not in_turn or left_s <= 0 or UNDER_WAY not in str(err):
                raise
        time.sleep(_POLL_S)
        fields = {**fields, "deadline_s": left_s}


def drain_gateway(args: argparse.Namespace, quiet_s: float = 12.0) -> int:
    """Drain a gateway; return once it has had no request for ``quiet_s`` seconds.

    ``quiet_s`` is longer than the gateway's ``leaving_lead_s``. Returns ``FAILED`` if this takes
    longer than ``--wait`` seconds, but ``OK`` with ``--wait 0``. Raises ``CommandError``.
    """
    admin = find_admin(args, args.gateway)
    if admin is None:
        raise CommandError(ExitCode.UNREACHABLE, "no admin port can be reached: give --admin-url")
    give_up = time.monotonic() + args.wait
    quiet_since = None  # a request may be between two of its steps
    while True:
        left = admin.post("/admin/v1/gateway/drain", {})
        now = time.monotonic()
        quiet_since = (quiet_since or now) if left["requests"] == 0 else None
        is_done = quiet_since is not None and now >= quiet_since + quiet_s
        if is_done or now >= give_up:
            break
        time.sleep(_POLL_S)
    text = f"{left['gateway']} serves {left['requests']} requests and rejects new ones"
    show(args, left, text)
    return ExitCode.OK if is_done or not args.wait else ExitCode.FAILED
