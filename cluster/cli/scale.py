"""``scale``: more or fewer workers of a pool, while the cluster serves."""

from __future__ import annotations

import argparse
import uuid
from typing import Any

from cluster.cli.drain import show_operation, wait_operation
from cluster.cli.exit_codes import CommandError, ExitCode
from cluster.cli.orders import add_address_option, orders_for

DEFAULT_LIMIT_S = 600.0


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register the command."""
    scale = commands.add_parser(
        "scale", parents=[common], help="change the size of the pools (not built yet: refused)"
    )
    scale.add_argument("--attention", type=_count, metavar="N", help="attention workers")
    scale.add_argument("--expert", type=_count, metavar="N", help="expert workers")
    scale.add_argument("--no-wait", action="store_true", help="return at once, see op")
    add_address_option(scale)
    scale.set_defaults(run=run_scale)


def _count(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError("must be at least 0")
    return value


def run_scale(args: argparse.Namespace) -> int:
    """Order it and wait for its end."""
    sizes = {"attention": args.attention, "expert": args.expert}
    order: dict[str, Any] = {k: v for k, v in sizes.items() if v is not None}
    if not order:
        raise CommandError(ExitCode.USAGE, "one of --attention and --expert is required")
    with orders_for(args) as orders:
        operation = orders.scale({**order, "request_id": uuid.uuid4().hex})
        if args.no_wait:
            return show_operation(args, operation)
        return wait_operation(args, orders, operation, args.timeout or DEFAULT_LIMIT_S)
