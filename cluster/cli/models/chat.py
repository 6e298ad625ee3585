"""``chat``: a conversation, its answers streamed to stdout."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from cluster.cli.models.generate import add_sampling, sampling_of, stream_text
from cluster.cli.terminal.arguments import Commands
from cluster.cli.terminal.client import Client
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.cli.terminal.output import note, out_json


def add_commands(commands: Commands) -> None:
    parser = commands.add("chat", run, "talk to the model")
    parser.add_argument("message", nargs="?", help="say this alone (a conversation: a line each)")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_sampling(parser)


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
        answer = stream_text(client, "/v1/chat/completions", body, show=not args.json)
        usage = answer["usage"]
        messages.append({"role": "assistant", "content": answer["text"]})
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
