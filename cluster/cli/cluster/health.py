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
    health = commands.add("health", run_health, "check the cluster; exit with 0 if healthy, else 4")
    text = "Check only the workers on the node with this IP"
    health.add_argument("--node", metavar="NAME", help=text)


def run_health(args: argparse.Namespace) -> int:
    """Print the reasons for bad health, or ``ok``; return the exit code.

    Raises ``CommandError`` if no server can be reached.
    """
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
    """Return reasons why workers on a node (an IP address) are not healthy; empty if all are.

    A worker in state ``SERVING`` has loaded its weights and takes part in the running generation.
    """
    mine = [w for w in workers if w["node"] == node and not is_gone(w["state"])]
    if not mine:
        return [f"no worker runs on {node}"]
    waiting = [w for w in mine if w["state"] != WorkerState.SERVING.value]
    return [f"{w['name']} is {w['state']}" for w in waiting]
