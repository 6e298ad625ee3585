"""``chat``: a conversation with outputs streamed to stdout."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from cluster.cli.models.generate import INTERRUPTED, add_sampling, sampling_fields, stream_text
from cluster.cli.terminal.arguments import CommandParsers
from cluster.cli.terminal.client import Client
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import note, write_json
from cluster.cli.terminal.stdin import is_terminal, stdin_lines


def add_commands(commands: CommandParsers) -> None:
    parser = commands.add("chat", run, "have a conversation with the model")
    text = "Single message (default: a conversation, one message per line)"
    parser.add_argument("message", nargs="?", help=text)
    parser.add_argument("--system", metavar="TEXT", help="System message")
    add_sampling(parser)


def run(args: argparse.Namespace) -> int:
    """Print each output as it arrives, or with ``--json`` all messages as one document at the end.

    In a conversation Ctrl-C ends the running output. On a terminal, a message whose output fails
    is removed from the conversation.
    """
    messages: list[dict[str, str]] = []
    if args.system:
        messages.append({"role": "system", "content": args.system})
    client = Client(args)
    is_conversation = args.message is None
    usage = None
    for text in _read_messages(args):
        asked = [*messages, {"role": "user", "content": text}]
        body = {"messages": asked, **sampling_fields(args)}
        try:
            answer = stream_text(
                client,
                "/v1/chat/completions",
                body,
                show=not args.json,
                may_interrupt=is_conversation,
            )
        except CommandError as err:
            if not (is_conversation and is_terminal()):
                raise
            note(f"expertmesh: {err}; the message is not part of the conversation: send it again")
            continue
        if answer["finish_reason"] == INTERRUPTED:
            note("(interrupted)")
            if not answer["text"]:
                continue
        usage = answer["usage"] or usage
        messages = [*asked, {"role": "assistant", "content": answer["text"]}]
    if args.json:
        write_json({"schema": 1, "messages": messages, "usage": usage})
    return ExitCode.OK


def _read_messages(args: argparse.Namespace) -> Iterator[str]:
    """Yield the user's messages: the argument, or lines of stdin."""
    if args.message is not None:
        yield args.message
        return
    if is_terminal():
        note("one message per line; Ctrl-C ends an answer, Ctrl-D the conversation")
    for line in stdin_lines():
        if line.strip():
            yield line.rstrip("\n")
