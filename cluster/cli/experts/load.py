"""``load``: shows how often tokens choose each expert, and how balanced the workers are."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.cli.terminal.arguments import CommandParsers, add_served_model_option, count
from cluster.cli.terminal.client import Client
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import save, show, table
from cluster.core.errors import ConfigError
from cluster.core.load_profile import LoadProfile, load_profile

VIEWS = ("total", "window", "average")
DEFAULT_TOP = 4


def add_commands(commands: CommandParsers) -> None:
    load = commands.add("load", run_load, "show the busiest experts and the balance of the workers")
    text = "Number of busiest experts to show for each layer"
    load.add_argument("--top", type=count, default=DEFAULT_TOP, help=text)
    text = "Period: total since start, newest window (10 s), or exponential average of the windows"
    load.add_argument("--of", choices=VIEWS, default="total", help=text)
    load.add_argument("--save", type=Path, help="Write the load to FILE as a load profile")
    load.add_argument("--merge", action="store_true", help="Add the load to the profile of --save")
    add_served_model_option(load)


def run_load(args: argparse.Namespace) -> int:
    """Print the load of the experts; with ``--save`` also write a load profile."""
    if args.merge and args.save is None:
        raise CommandError(ExitCode.USAGE, "--merge needs --save")
    document = Client(args).get("/cluster/v1/load")
    if args.save is not None:
        _save(profile_of(document, args.of), args.save, args.merge)
    heading = (
        f"{document['tokens']} tokens since the start, {document.get('window_tokens', 0)} in the "
        f"newest window; placement epoch {document['epoch']}"
    )
    return show(args, document, lambda: _text(document, args.of, args.top), heading)


def profile_of(document: Mapping[str, Any], view: str) -> LoadProfile:
    """Convert a view of the load document to a load profile. Raises ``CommandError`` if empty.

    ``view``: ``total``, ``window`` or ``average``.
    """
    tokens = document["tokens" if view == "total" else f"{view}_tokens"]
    if not tokens:
        raise CommandError(ExitCode.REFUSED, f"no load has been recorded yet ({view})")
    banks = [
        {"bank": b["bank"], "layer": b["layer"], "counts": _counts(b, view)}
        for b in document["banks"]
    ]
    same = {key: document[key] for key in ("schema", "model", "top_k")}
    return LoadProfile.from_dict({**same, "tokens": tokens, "banks": banks})


def _counts(bank: Mapping[str, Any], view: str) -> Sequence[float]:
    counts: Sequence[float] | None = bank["counts" if view == "total" else view]
    return [0] * len(bank["counts"]) if counts is None else counts


def _save(profile: LoadProfile, path: Path, merge: bool) -> None:
    try:
        if merge and path.exists():
            profile = load_profile(path).merge(profile)
    except ConfigError as err:
        raise CommandError(ExitCode.REFUSED, str(err)) from err
    save(path, json.dumps(profile.to_dict()) + "\n", f": {profile.tokens} tokens")


def _text(document: Mapping[str, Any], view: str, top: int) -> str:
    """Format a line for each bank: its busiest experts, and the balance of the workers."""
    header = ("LAYER", "BANK", f"BUSIEST OF {view.upper()}", "PREFILL", "DECODE", "EXPECTED")
    rows = [_row(bank, view, top) for bank in document["banks"]]
    whole = document.get("phases", {})
    rows.append(("all", "", "", *_balance(whole, document.get("balancedness", {}))))
    legend = (
        "BUSIEST: expert and its share of the bank's tokens; even is the share under equal load."
        "\nPREFILL, DECODE: balancedness of the expert workers in this placement epoch (mean over "
        "maximum load,\n1 is ideal). EXPECTED: balancedness under the load profile given at start "
        "(--load-profile)."
    )
    return f"{table(header, rows)}\n\n{legend}"


def _row(bank: Mapping[str, Any], view: str, top: int) -> tuple[str, ...]:
    counts = _counts(bank, view)
    total = sum(counts) or 1
    order = sorted(range(len(counts)), key=lambda e: (-counts[e], e))[: max(top, 0)]
    busiest = " ".join(f"{e}:{counts[e] / total:.1%}" for e in order)
    text = f"{busiest}  (even {1 / len(counts):.1%})" if sum(counts) else "no load yet"
    balance = _balance(bank["phases"], bank["balancedness"])
    return (str(bank["layer"]), bank["bank"], text, *balance)


def _balance(phases: Mapping[str, Any], both: Mapping[str, Any]) -> tuple[str, str, str]:
    achieved = [phases.get(phase, {}).get("achieved") for phase in ("prefill", "decode")]
    prefill, decode, expected = (
        "-" if value is None else f"{value:.3f}" for value in (*achieved, both.get("predicted"))
    )
    return prefill, decode, expected
