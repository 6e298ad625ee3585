"""``rebalance``: moves experts according to the load, or predicts the gain."""

from __future__ import annotations

import argparse
import uuid
from collections.abc import Mapping
from typing import Any

from cluster.cli.terminal.admin_client import make_admin_client
from cluster.cli.terminal.arguments import (
    CommandParsers,
    add_address_option,
    add_served_model_option,
    add_wait_option,
)
from cluster.cli.terminal.operations import follow_operation

DEFAULT_LIMIT_S = 600.0


def add_commands(commands: CommandParsers) -> None:
    rebalance = commands.add(
        "rebalance", run_rebalance, "move experts to balance the load while the cluster serves"
    )
    text = "Predict the moves and the gain without a change"
    rebalance.add_argument("--dry-run", action="store_true", help=text)
    add_wait_option(rebalance, DEFAULT_LIMIT_S)
    add_address_option(rebalance)
    add_served_model_option(rebalance)


def run_rebalance(args: argparse.Namespace) -> int:
    """Start a rebalancing and wait for its end; return the exit code."""
    fields = {"dry_run": args.dry_run, "request_id": uuid.uuid4().hex}
    with make_admin_client(args) as admin:
        return follow_operation(args, admin, admin.rebalance(fields), args.wait)


def describe(rebalance: Mapping[str, Any]) -> str:
    """Format the ``rebalance`` part of the status document as one line."""
    if not rebalance["possible"]:
        return f"not possible: {rebalance['reason']}"
    words = "automatic" if rebalance["automatic"] else "by command (--enable-eplb: automatic)"
    if rebalance.get("problem"):
        words += f"; {rebalance['problem']}"
    if rebalance["phase"]:
        words += f"; {rebalance['phase']}"
    last = rebalance["last"]
    return f"{words}; last: {last['outcome']}, {last['text']}" if last else words
