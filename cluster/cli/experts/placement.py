"""``placement``: which expert slot of which worker holds which expert."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.cli.terminal.arguments import Commands
from cluster.cli.terminal.client import Client
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import show, table


def add_commands(commands: Commands) -> None:
    placement = commands.add("placement", run_placement, "which expert is where")
    placement.add_argument("--layer", type=int, metavar="N", help="one layer only")


def run_placement(args: argparse.Namespace) -> int:
    client = Client(args)
    document = client.get("/cluster/v1/placement")
    if args.layer is not None:
        document["banks"] = [b for b in document["banks"] if b["layer"] == args.layer]
        if not document["banks"]:
            raise CommandError(ExitCode.REFUSED, f"layer {args.layer} has no expert bank")
    heading = f"placement epoch {document['epoch']}"
    return show(args, document, lambda: _text(client, document), heading)


def _text(client: Client, document: Mapping[str, Any]) -> str:
    workers = client.get("/cluster/v1/status")["workers"]
    holders = {w["rank"]: w["name"] for w in workers if w.get("slots") is not None}
    rows = [
        (bank["layer"], bank["bank"], holders.get(device, "-"), " ".join(row))
        for bank in document["banks"]
        for device, row in enumerate(_marked(bank["physical_to_logical"]))
    ]
    legend = "12*: expert 12, which has other copies. -: an empty slot."
    return f"{table(('LAYER', 'BANK', 'WORKER', 'EXPERTS BY SLOT'), rows)}\n\n{legend}"


def _marked(devices: Sequence[Sequence[int]]) -> list[list[str]]:
    """Text of each slot of each device."""
    copies = Counter(expert for slots in devices for expert in slots)

    def text(expert: int) -> str:
        return "-" if expert < 0 else f"{expert}*" if copies[expert] > 1 else str(expert)

    return [[text(expert) for expert in slots] for slots in devices]
