"""``tokenize``: shows the tokens of a text, or the text of tokens."""

from __future__ import annotations

import argparse
from typing import Any

from cluster.cli.terminal.arguments import CommandParsers, add_model_option
from cluster.cli.terminal.client import Client
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import note, table, write_json, write_line
from cluster.cli.terminal.stdin import read_stdin


def add_commands(commands: CommandParsers) -> None:
    parser = commands.add("tokenize", run, "show the tokens of a text, or the text of tokens")
    add_text_or_ids(parser)


def add_text_or_ids(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for a text or token ids, and ``--model``."""
    parser.add_argument("text", nargs="?", help="Text; - reads it from stdin")
    parser.add_argument("--ids", type=_ids, metavar="5,6,7", help="Token ids instead of a text")
    add_model_option(parser)


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as err:
        raise argparse.ArgumentTypeError("must be whole numbers, separated by commas") from err


def check_text_or_ids(args: argparse.Namespace) -> None:
    """Raise ``CommandError`` unless exactly one of text and token ids is given."""
    if (args.text is None) is (args.ids is None):
        raise CommandError(ExitCode.USAGE, "one of a text and --ids is required")


def model_field(args: argparse.Namespace) -> dict[str, str]:
    """Return the field ``model`` of a request body; empty without ``--model``."""
    return {} if args.model is None else {"model": args.model}


def tokens_of(args: argparse.Namespace) -> dict[str, Any]:
    """Tokenize the text of ``args`` at the gateway and return the response."""
    text = read_stdin() if args.text == "-" else args.text
    body = {"prompt": text, "return_token_strs": True, **model_field(args)}
    answer: dict[str, Any] = Client(args).run_model("/tokenize", body)
    return answer


def run(args: argparse.Namespace) -> int:
    """Print a line for each token, or the text, or with ``--json`` the whole response."""
    check_text_or_ids(args)
    if args.ids is not None:
        answer = Client(args).run_model("/detokenize", {"tokens": args.ids, **model_field(args)})
    else:
        answer = tokens_of(args)
    if args.json:
        write_json({"schema": 1, **answer})
    elif args.ids is not None:
        write_line(answer["prompt"])
    else:
        rows = zip(answer["tokens"], map(repr, answer["token_strs"]), strict=True)
        write_line(table(("ID", "TOKEN"), list(rows)))
        note(f"{answer['count']} tokens, the model takes {answer['max_model_len']}")
    return ExitCode.OK
