"""``health``: probes whether the cluster, or the workers of a node, are serving."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.cli.terminal.arguments import CommandParsers
from cluster.cli.terminal.client import Client, require_full_status
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.cli.terminal.output import show
from cluster.core.states import WorkerState, is_gone


def add_commands(commands: CommandParsers) -> None:
    health = commands.add("health", run_health, "exits 0 if healthy and 4 if not, for probes")
    health.add_argument(
        "--node", metavar="NAME", help="only its workers: are they loaded and in the generation"
    )


def run_health(args: argparse.Namespace) -> int:
    """Print and return whether all is healthy; an unreachable server is not."""
    client = Client(args)
    if args.node is None:
        answer = client.get("/ready", any_status=True)
        is_well = bool(answer.get("ready"))
        reasons = [] if is_well else list(map(str, answer.get("reasons", ["not ready"])))
    else:
        status = client.get("/cluster/v1/status")
        require_full_status(status, "the nodes of workers")
        reasons = unhealthy_reasons(args.node, status["workers"])
    document = {"schema": 1, "healthy": not reasons, "reasons": reasons}
    show(args, document, "; ".join(reasons) or "ok")
    return ExitCode.NOT_READY if reasons else ExitCode.OK


def unhealthy_reasons(node: str, workers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why the workers on a node, given by its address, are not healthy; empty if they are.

    A worker that is ``SERVING`` has its weights, takes part in the running generation and so uses
    the placement epoch of its leader.
    """
    mine = [w for w in workers if w["node"] == node and not is_gone(w["state"])]
    if not mine:
        return [f"no worker runs on {node}"]
    waiting = [w for w in mine if w["state"] != WorkerState.SERVING.value]
    return [f"{w['name']} is {w['state']}" for w in waiting]
