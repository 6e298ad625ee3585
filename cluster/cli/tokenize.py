"""``tokenize``: the tokens of a text, or the text of tokens."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cluster.cli.client import Client
from cluster.cli.exit_codes import CommandError, ExitCode
from cluster.cli.inspection import parse_ids
from cluster.cli.terminal import note, out_json, out_line, table


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register ``tokenize``."""
    parser = commands.add_parser("tokenize", parents=[common], help="tokens of a text, and back")
    parser.add_argument("text", nargs="?", help="text, - reads it from stdin")
    parser.add_argument("--ids", type=parse_ids, metavar="5,6,7", help="tokens, to show their text")
    parser.add_argument("--model", help="served model (the only one)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print a line for each token, or the text; with ``--json`` the whole answer."""
    if (args.text is None) is (args.ids is None):
        raise CommandError(ExitCode.USAGE, "one of a text and --ids is required")
    model = {} if args.model is None else {"model": args.model}
    if args.ids is not None:
        answer = Client(args).post("/detokenize", {"tokens": args.ids, **model})
    else:
        text = sys.stdin.read() if args.text == "-" else args.text
        body = {"prompt": text, "return_token_strs": True, **model}
        answer = Client(args).post("/tokenize", body)
    if args.json:
        out_json({"schema": 1, **answer})
    elif args.ids is not None:
        out_line(answer["prompt"])
    else:
        rows = zip(answer["tokens"], map(repr, answer["token_strs"]), strict=True)
        out_line(table(("ID", "TOKEN"), list(rows)))
        note(f"{answer['count']} tokens, the model takes {answer['max_model_len']}")
    return ExitCode.OK
