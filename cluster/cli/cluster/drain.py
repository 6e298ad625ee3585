"""``drain``: empty workers or a gateway before they are stopped; no request fails.

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
"""Time after its own deadline within which an operation must end."""


def add_commands(commands: CommandParsers) -> None:
    kinds = commands.add_group("drain", "empty workers or a gateway; no request fails")
    for what, text in (
        ("worker", "empty a worker and end it"),
        ("node", "empty and end all workers of a node"),
    ):
        parser = kinds.add(what, run_drain, text)
        parser.add_argument("target", metavar="NAME", help="as in workers")
        text = "a drain that takes longer is undone"
        parser.add_argument(
            "--deadline", type=seconds, default=DEFAULT_LIMIT_S, metavar="SECONDS", help=text
        )
        parser.add_argument("--force", action="store_true", help="end it at the deadline instead")
        text = "wait while another operation runs; the deadline counts from now all the same"
        parser.add_argument("--in-turn", action="store_true", help=text)
        add_wait_option(parser, None, "the deadline and 10 more")
        add_address_option(parser)
        parser.set_defaults(what=what)
    text = "drain a gateway: it finishes its requests and accepts no new ones"
    parser = kinds.add("gateway", drain_gateway, text)
    parser.add_argument(
        "gateway",
        nargs="?",
        metavar="NAME",
        help="as in status (default: the gateway of --admin-url)",
    )
    add_wait_option(parser, DEFAULT_LIMIT_S)


def run_drain(args: argparse.Namespace) -> int:
    """Start a drain and wait for its end."""
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
    """Start a drain; ``in_turn`` waits for other operations, as pods may be stopped together.

    Raises ``CommandError`` and ``ConflictError``.
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
    """Drain a gateway until it has had no request for ``quiet_s``, which is longer than its
    ``leaving_lead_s``. Raises ``CommandError``.
    """
    admin = find_admin(args, args.gateway)
    if admin is None:
        raise CommandError(ExitCode.UNREACHABLE, "no admin port in reach: --admin-url")
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
    text = f"{left['gateway']} serves {left['requests']} requests and takes no more clients"
    show(args, left, text)
    return ExitCode.OK if is_done or not args.wait else ExitCode.FAILED
