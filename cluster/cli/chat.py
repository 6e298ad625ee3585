"""``chat``: a conversation, its answers streamed to stdout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from cluster.cli.client import Client
from cluster.cli.exit_codes import CommandError, ExitCode
from cluster.cli.generate import add_sampling, sampling_of
from cluster.cli.terminal import note, out, out_json


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register ``chat``."""
    parser = commands.add_parser("chat", parents=[common], help="talk to the model")
    parser.add_argument("message", nargs="?", help="say this alone (a conversation: a line each)")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told at first")
    add_sampling(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print each answer as it comes; with ``--json`` all messages as one document at the end."""
    messages: list[dict[str, str]] = []
    if args.system:
        messages.append({"role": "system", "content": args.system})
    client = Client(args)
    usage = None
    for text in _said(args):
        messages.append({"role": "user", "content": text})
        body = {"messages": messages, **sampling_of(args)}
        answer, usage = _answer(client, body, show=not args.json)
        messages.append({"role": "assistant", "content": answer})
    if args.json:
        out_json({"schema": 1, "messages": messages, "usage": usage})
    return ExitCode.OK


def _said(args: argparse.Namespace) -> Iterator[str]:
    """What the user says: the message, or lines up to the end of stdin."""
    if args.message is not None:
        yield args.message
        return
    if sys.stdin.isatty():
        note("a line each; Ctrl-D ends it")
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\n")


def _answer(client: Client, body: dict[str, Any], show: bool) -> tuple[str, Any]:
    """The model's text and the usage. Raises ``CommandError`` for a stream without an end."""
    text, usage, is_whole = "", None, False
    for event in client.stream("/v1/chat/completions", body):
        if "error" in event:
            raise CommandError(ExitCode.FAILED, str(event["error"]["message"]))
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            piece = choice["delta"].get("content") or ""
            text += piece
            is_whole = is_whole or choice["finish_reason"] is not None
            if show:
                out(piece)
    if not is_whole:
        raise CommandError(ExitCode.FAILED, "the stream ended before the answer was finished")
    if show:
        out("\n")
    return text, usage
