"""``scale``: adds workers, or drains and ends some of them, while the others serve."""

from __future__ import annotations

import argparse
import uuid

from cluster.cli.terminal.admin_client import make_admin_client
from cluster.cli.terminal.arguments import (
    CommandParsers,
    add_address_option,
    add_served_model_option,
    add_wait_option,
    count,
    seconds,
)
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.operations import follow_operation

DEFAULT_LIMIT_S = 300.0
_GRACE_S = 10.0
"""Seconds for which the command waits for a scaling's end after the scaling's deadlines."""


def add_commands(commands: CommandParsers) -> None:
    scale = commands.add("scale", run_scale, "change the number of workers; no request fails")
    scale.add_argument("--attention", type=count, metavar="N", help="Number of attention workers")
    text = "Number of attention workers that compute prompts, in a cluster with prefill workers"
    scale.add_argument("--prefill", type=count, metavar="N", help=text)
    text = "Number of attention workers that decode, in a cluster with prefill workers"
    scale.add_argument("--decode", type=count, metavar="N", help=text)
    text = "Number of expert workers; in colocated mode of all workers"
    scale.add_argument("--expert", type=count, metavar="N", help=text)
    text = "Time limit for new workers to serve, and again for the drain of surplus workers"
    scale.add_argument(
        "--deadline", type=seconds, default=DEFAULT_LIMIT_S, metavar="SECONDS", help=text
    )
    add_wait_option(scale, None, "twice --deadline plus 10")
    add_address_option(scale)
    add_served_model_option(scale)


def run_scale(args: argparse.Namespace) -> int:
    """Start a scaling and wait for its end; return the exit code. Raises ``CommandError``."""
    pools = ("attention", "prefill", "decode", "expert")
    counts = {pool: n for pool in pools if (n := getattr(args, pool)) is not None}
    if not counts:
        text = "one of --attention, --expert, --prefill and --decode is required"
        raise CommandError(ExitCode.USAGE, text)
    fields = {**counts, "deadline_s": args.deadline, "request_id": uuid.uuid4().hex}
    wait_s = 2 * args.deadline + _GRACE_S if args.wait is None else args.wait
    with make_admin_client(args) as admin:
        return follow_operation(args, admin, admin.scale(fields), wait_s)
