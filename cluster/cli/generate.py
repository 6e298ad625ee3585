"""``generate``: one completion, streamed to stdout."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from cluster.cli.client import Client
from cluster.cli.exit_codes import CommandError, ExitCode
from cluster.cli.terminal import out, out_json


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register ``generate``."""
    parser = commands.add_parser("generate", parents=[common], help="complete a text")
    parser.add_argument("text", help="prompt, - reads it from stdin")
    add_sampling(parser)
    parser.set_defaults(run=run)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add what says how text is drawn."""
    parser.add_argument("--model", help="served model (the only one)")
    parser.add_argument("--max-tokens", type=int, default=64, metavar="N", help="limit (64)")
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="0 takes the likeliest token"
    )
    parser.add_argument("--top-p", type=float, metavar="P", help="nucleus")
    parser.add_argument("--seed", type=int, metavar="N", help="same seed, same text")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end before this text")


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of a streamed request."""
    body: dict[str, Any] = {"max_tokens": args.max_tokens, "stream": True}
    body["stream_options"] = {"include_usage": True}
    for field in ("model", "temperature", "top_p", "seed", "stop"):
        if getattr(args, field) is not None:
            body[field] = getattr(args, field)
    return body


def run(args: argparse.Namespace) -> int:
    """Print the text as it comes; with ``--json`` one document at the end."""
    prompt = sys.stdin.read() if args.text == "-" else args.text
    body = {"prompt": prompt, **sampling_of(args)}
    answer: dict[str, Any] = {"schema": 1, "text": "", "finish_reason": None, "usage": None}
    for event in Client(args).stream("/v1/completions", body):
        _take(event, answer, show=not args.json)
    if answer["finish_reason"] is None:
        raise CommandError(ExitCode.FAILED, "the stream ended before the text was finished")
    if args.json:
        out_json(answer)
    else:
        out("\n")
    return ExitCode.OK


def _take(event: dict[str, Any], answer: dict[str, Any], show: bool) -> None:
    if "error" in event:
        raise CommandError(ExitCode.FAILED, str(event["error"]["message"]))
    answer["usage"] = event.get("usage") or answer["usage"]
    for choice in event["choices"]:
        answer["text"] += choice["text"]
        answer["finish_reason"] = choice["finish_reason"] or answer["finish_reason"]
        if show:
            out(choice["text"])
