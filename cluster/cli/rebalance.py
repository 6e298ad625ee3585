"""``rebalance``: move experts to where the load is, or say what that would bring."""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Mapping
from typing import Any

from cluster.cli.drain import show_operation, wait_operation
from cluster.cli.orders import add_address_option, orders_for

DEFAULT_LIMIT_S = 600.0


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register the command."""
    rebalance = commands.add_parser(
        "rebalance",
        parents=[common],
        help="move experts to where the load is, while the cluster serves",
    )
    rebalance.add_argument(
        "--dry-run", action="store_true", help="only say what would be done, and what it brings"
    )
    rebalance.add_argument("--no-wait", action="store_true", help="return at once, see op")
    add_address_option(rebalance)
    rebalance.set_defaults(run=run_rebalance)


def run_rebalance(args: argparse.Namespace) -> int:
    """Order it and wait for its end."""
    order = {"dry_run": args.dry_run, "request_id": uuid.uuid4().hex}
    with orders_for(args) as orders:
        operation = orders.rebalance(order)
        if args.no_wait:
            return show_operation(args, operation)
        return wait_operation(args, orders, operation, args.timeout or DEFAULT_LIMIT_S)


def describe(rebalance: Mapping[str, Any]) -> str:
    """What ``status`` says of it, in one line."""
    if not rebalance["possible"]:
        return f"not possible: {rebalance['reason']}"
    words = "automatic" if rebalance["automatic"] else "when told to (--enable-eplb: by itself)"
    if rebalance.get("problem"):
        words += f"; {rebalance['problem']}"
    if rebalance["phase"]:
        words += f"; {rebalance['phase']}"
    last = rebalance["last"]
    return f"{words}; last: {last['outcome']}, {last['text']}" if last else words
