"""``placement``: shows which expert slot of which worker holds which expert."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.cli.terminal.arguments import (
    CommandParsers,
    add_served_model_option,
    count_or_0,
)
from cluster.cli.terminal.client import Client
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import has_colours, shade, show, table


def add_commands(commands: CommandParsers) -> None:
    placement = commands.add(
        "placement", run_placement, "show the expert in each slot of each worker"
    )
    placement.add_argument("--layer", type=count_or_0, metavar="N", help="Show only this layer")
    add_served_model_option(placement)


def run_placement(args: argparse.Namespace) -> int:
    client = Client(args)
    document = client.get("/cluster/v1/placement")
    if args.layer is not None:
        document["banks"] = [b for b in document["banks"] if b["layer"] == args.layer]
        if not document["banks"]:
            raise CommandError(ExitCode.REFUSED, f"layer {args.layer} has no expert bank")
    heading = f"placement epoch {document['epoch']}"
    colours = has_colours(not args.no_color)
    return show(args, document, lambda: _text(client, document, colours), heading)


def _text(client: Client, document: Mapping[str, Any], colours: bool) -> str:
    workers = client.get("/cluster/v1/status")["workers"]
    holders = {w["rank"]: w["name"] for w in workers if w.get("slots") is not None}
    rows = [
        (bank["layer"], bank["bank"], holders.get(device, "-"), " ".join(row))
        for bank in document["banks"]
        for device, row in enumerate(_marked(bank, colours))
    ]
    legend = "12*: expert 12, which has other copies. -: an empty slot."
    if colours:
        legend += f" {shade('Stronger', 0.99)}: more of the layer's tokens."
    return f"{table(('LAYER', 'BANK', 'WORKER', 'EXPERTS BY SLOT'), rows)}\n\n{legend}"


def _marked(bank: Mapping[str, Any], colours: bool) -> list[list[str]]:
    """Format each expert slot of each device; with ``colours`` a copy's shade shows its load."""
    devices: Sequence[Sequence[int]] = bank["physical_to_logical"]
    copies = Counter(expert for slots in devices for expert in slots)
    load: Sequence[float] = bank["load"]
    most = max((tokens / max(copies[e], 1) for e, tokens in enumerate(load)), default=0) or 1

    def text(expert: int) -> str:
        if expert < 0:
            return "-"
        name = f"{expert}*" if copies[expert] > 1 else str(expert)
        return shade(name, load[expert] / copies[expert] / most) if colours and load else name

    return [[text(expert) for expert in slots] for slots in devices]
