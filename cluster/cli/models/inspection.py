"""``inspect``: shows the log-probability and experts of each token of a text."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cluster.cli.models.tokenize import (
    add_text_or_ids,
    check_text_or_ids,
    model_field,
    tokens_of,
)
from cluster.cli.terminal.arguments import CommandParsers
from cluster.cli.terminal.client import Client
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import note, table, write_json, write_line

SHOWN = ("logprobs", "loss", "routes")
"""Names of the outputs that ``inspect`` requests for its table."""


def add_commands(commands: CommandParsers) -> None:
    parser = commands.add("inspect", run, "show the log-probability and experts of each token")
    add_text_or_ids(parser)
    shown = ", ".join(SHOWN)
    text = f"Output to include with --json, see docs/reference/outputs.md (default: {shown})"
    parser.add_argument("--output", action="append", metavar="NAME", help=text)
    text = "Bank of experts to show, as KIND:LAYER (default: the first)"
    parser.add_argument("--bank", metavar="mlp:0", help=text)


def run(args: argparse.Namespace) -> int:
    """Print a line for each token, or with ``--json`` the whole response."""
    check_text_or_ids(args)
    if args.output and not args.json:
        raise CommandError(ExitCode.USAGE, "--output needs --json")
    ids, names = args.ids, None
    if ids is None:
        found = tokens_of(args)
        ids, names = found["tokens"], found["token_strs"]
    body = {"token_ids": ids, "outputs": args.output or list(SHOWN), **model_field(args)}
    answer = Client(args).run_model("/v1/inspect", body)
    if args.json:
        write_json({"schema": 1, "token_ids": ids, **answer})
        return ExitCode.OK
    row = answer["data"][0]
    bank = _bank(row["routes"], args.bank)
    header = ("POSITION", "ID", "TOKEN", "LOGPROB", f"EXPERTS OF {bank['bank']}:{bank['layer']}")
    write_line(table(header, _lines(ids, names, row["logprobs"], bank)))
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
    """Return one row per token with log-probability and experts, the largest weight first."""
    rows: list[tuple[object, ...]] = []
    for place, (token, logprob) in enumerate(zip(ids, logprobs, strict=True)):
        pairs = zip(bank["topk_weights"][place], bank["topk_ids"][place], strict=True)
        experts = " ".join(f"{expert}:{weight:.2f}" for weight, expert in sorted(pairs)[::-1])
        name = "" if names is None else repr(names[place])[1:-1]
        rows.append((place, token, name, "-" if logprob is None else f"{logprob:.3f}", experts))
    return rows
