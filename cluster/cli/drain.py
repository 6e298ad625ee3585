"""``drain`` and ``op``: orders that change a running cluster, and how they come along.

A worker's drain is an operation of the controller. A gateway's is its own: it is asked how many
requests it still has until there are none.
"""

from __future__ import annotations

import argparse
import time
import uuid
from collections.abc import Mapping
from typing import Any

from cluster.cli.exit_codes import CommandError, ExitCode
from cluster.cli.orders import Orders, add_address_option, find_admin, orders_for
from cluster.cli.terminal import note, out_json, out_line

DEFAULT_LIMIT_S = 120.0
POLL_S = 0.1
_QUIET_S = 12.0
"""Time without a request after which a gateway is done; longer than its ``LEAVING_LEAD_S``."""
_GRACE_S = 10.0
"""Time past its own limit in which an operation must have ended."""


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register the two commands."""
    drain = commands.add_parser(
        "drain",
        parents=[common],
        help="empty a worker and end it; no request fails (--timeout: 120 s, then it is undone)",
    )
    whom = drain.add_mutually_exclusive_group(required=True)
    whom.add_argument("worker", nargs="?", metavar="WORKER", help="its name")
    whom.add_argument("--node", metavar="NAME", help="all workers of a node")
    whom.add_argument(
        "--gateway", action="store_true", help="the gateway of --admin-url, before it is stopped"
    )
    drain.add_argument("--force", action="store_true", help="past the limit end it all the same")
    drain.add_argument("--no-wait", action="store_true", help="return at once, see op")
    add_address_option(drain)
    drain.set_defaults(run=run_drain)
    op = commands.add_parser("op", parents=[common], help="how far an operation is")
    op.add_argument("id", metavar="ID", help="as drain tells it")
    op.add_argument("--wait", action="store_true", help="until it has ended")
    add_address_option(op)
    op.set_defaults(run=run_op)


def run_drain(args: argparse.Namespace) -> int:
    """Order a drain and wait for its end."""
    limit_s = args.timeout or DEFAULT_LIMIT_S
    if args.gateway:
        return drain_gateway(args, limit_s)
    whom = {"worker": args.worker} if args.worker else {"node": args.node}
    order = {"deadline_s": limit_s, "force": args.force, "request_id": uuid.uuid4().hex}
    with orders_for(args) as orders:
        operation = orders.drain({**whom, **order})
        if args.no_wait:
            return show_operation(args, operation)
        return wait_operation(args, orders, operation, limit_s + _GRACE_S)


def drain_gateway(args: argparse.Namespace, limit_s: float) -> int:
    """Let a gateway serve what it has. Raises ``CommandError``."""
    admin = find_admin(args)
    if admin is None:
        raise CommandError(ExitCode.UNREACHABLE, "no admin port in reach: --admin-url")
    give_up = time.monotonic() + limit_s
    quiet_since = None  # a request may be between two of its steps
    while True:
        left = admin.post("/admin/v1/gateway/drain", {})
        now = time.monotonic()
        quiet_since = (quiet_since or now) if left["requests"] == 0 else None
        is_done = quiet_since is not None and now >= quiet_since + _QUIET_S
        if args.no_wait or is_done or now > give_up:
            break
        time.sleep(POLL_S)
    if args.json:
        out_json(left)
    else:
        out_line(f"{left['gateway']} serves {left['requests']} requests and takes no more clients")
    return ExitCode.OK if args.no_wait or is_done else ExitCode.FAILED


def run_op(args: argparse.Namespace) -> int:
    """Print an operation; with ``--wait`` once it has ended."""
    with orders_for(args) as orders:
        operation = orders.operation(args.id)
        if not args.wait:
            return show_operation(args, operation)
        return wait_operation(args, orders, operation, args.timeout or float("inf"))


def wait_operation(
    args: argparse.Namespace, orders: Orders, operation: dict[str, Any], limit_s: float
) -> int:
    """Tell its phases until it ends. Raises ``CommandError`` past the limit."""
    give_up = time.monotonic() + limit_s
    phase = ""
    while operation["state"] == "RUNNING":
        if operation["phase"] != phase:
            phase = operation["phase"]
            note(f"{operation['id']} {operation['target']}: {phase}")
        if time.monotonic() > give_up:
            message = f"{operation['id']} has not ended within {limit_s:g} s: expertmesh op"
            raise CommandError(ExitCode.NOT_READY, message)
        time.sleep(POLL_S)
        operation = orders.operation(operation["id"])
    return show_operation(args, operation)


def show_operation(args: argparse.Namespace, operation: dict[str, Any]) -> int:
    if args.json:
        out_json(operation)
    else:
        out_line(_text(operation))
    ended_well = operation["state"] in ("RUNNING", "SUCCEEDED")
    return ExitCode.OK if ended_well else ExitCode.FAILED


def _text(operation: Mapping[str, Any]) -> str:
    """``drain-1.1 SUCCEEDED: attention-1 is drained (3 requests moved, 0.4 s)``."""
    words = operation["message"] or f"{operation['target']}: {operation['phase']}"
    text = f"{operation['id']} {operation['state']}: {words}"
    if operation["state"] != "SUCCEEDED":
        return text
    took = f"{operation['ended'] - operation['started']:.1f} s"
    moved = operation.get("drain", {}).get("requests_moved", 0)
    copied = operation.get("drain", {}).get("experts_copied", 0)
    facts = [f"{moved} requests moved"] if moved else []
    facts += [f"{copied} experts copied"] if copied else []
    return f"{text} ({', '.join([*facts, took])})"
