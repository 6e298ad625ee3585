"""``inspect``: what the model makes of each token of a text, its experts and log-probabilities."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.cli.client import Client
from cluster.cli.exit_codes import CommandError, ExitCode
from cluster.cli.terminal import note, out_json, out_line, table

SHOWN = ("logprobs", "loss", "routes")
"""Outputs that the table for people is made of."""


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register ``inspect``."""
    parser = commands.add_parser("inspect", parents=[common], help="look inside for given tokens")
    parser.add_argument("text", nargs="?", help="text, - reads it from stdin")
    parser.add_argument(
        "--ids", type=parse_ids, metavar="5,6,7", help="token ids in place of a text"
    )
    parser.add_argument("--model", help="served model (the only one)")
    parser.add_argument(
        "--output",
        action="append",
        metavar="NAME",
        help="what to ask for, see docs/outputs.md; with --json (logprobs, loss, routes)",
    )
    parser.add_argument("--bank", metavar="mlp:0", help="whose experts are shown (the first)")
    parser.set_defaults(run=run)


def parse_ids(text: str) -> list[int]:
    """``5,6,7``. Raises ``ArgumentTypeError``."""
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as err:
        raise argparse.ArgumentTypeError("must be whole numbers with commas") from err


def run(args: argparse.Namespace) -> int:
    """Print a line for each token; with ``--json`` the whole answer."""
    if (args.text is None) is (args.ids is None):
        raise CommandError(ExitCode.USAGE, "one of a text and --ids is required")
    if args.output and not args.json:
        raise CommandError(ExitCode.USAGE, "--output needs --json")
    client = Client(args)
    model = {} if args.model is None else {"model": args.model}
    ids, names = args.ids, None
    if ids is None:
        text = sys.stdin.read() if args.text == "-" else args.text
        found = client.post("/tokenize", {"prompt": text, "return_token_strs": True, **model})
        ids, names = found["tokens"], found["token_strs"]
    body = {"token_ids": ids, "outputs": args.output or list(SHOWN), **model}
    answer = client.post("/v1/inspect", body)
    if args.json:
        out_json({"schema": 1, "token_ids": ids, **answer})
        return ExitCode.OK
    row = answer["data"][0]
    bank = _bank(row["routes"], args.bank)
    header = ("POSITION", "ID", "TOKEN", "LOGPROB", f"EXPERTS OF {bank['bank']}:{bank['layer']}")
    out_line(table(header, _lines(ids, names, row["logprobs"], bank)))
    if answer["loss"] is not None:
        note(f"loss {answer['loss']:.4f}, perplexity {math.exp(min(answer['loss'], 700.0)):.4g}")
    return ExitCode.OK


def _bank(routes: Sequence[Mapping[str, Any]], name: str | None) -> Mapping[str, Any]:
    known = {f"{bank['bank']}:{bank['layer']}": bank for bank in routes}
    if name is None:
        return routes[0]
    if name not in known:
        raise CommandError(ExitCode.REFUSED, f"--bank {name} is not one of {', '.join(known)}")
    return known[name]


def _lines(
    ids: Sequence[int],
    names: Sequence[str] | None,
    logprobs: Sequence[float | None],
    bank: Mapping[str, Any],
) -> list[tuple[object, ...]]:
    """By token: what it is, how probable it was, and its experts, the heaviest first."""
    rows: list[tuple[object, ...]] = []
    for place, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
        pairs = zip(bank["topk_weights"][place], bank["topk_ids"][place], strict=True)
        experts = " ".join(f"{expert}:{weight:.2f}" for weight, expert in sorted(pairs)[::-1])
        name = "" if names is None else repr(names[place])[1:-1]
        rows.append((place, token, name, "-" if logprob is None else f"{logprob:.3f}", experts))
    return rows
