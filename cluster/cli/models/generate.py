"""``generate``: one completion, streamed to stdout."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from cluster.cli.terminal.arguments import CommandParsers, Number, add_model_option, count, fraction
from cluster.cli.terminal.client import Client
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import write_json, write_result
from cluster.cli.terminal.stdin import read_stdin

INTERRUPTED = "interrupted"
"""Finish reason of an output that the user ended with Ctrl-C."""
_INT64_LIMIT = 2**63


def add_commands(commands: CommandParsers) -> None:
    parser = commands.add("generate", run, "complete a text")
    parser.add_argument("text", help="Prompt; - reads it from stdin")
    add_sampling(parser)


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add ``--model`` and the sampling options."""
    add_model_option(parser)
    text = "Maximum number of output tokens"
    parser.add_argument("--max-tokens", type=count, default=64, help=text)
    heat = Number(kind=float, rule="must be a number from 0 to 100", low=0, high=100)
    text = "Sampling temperature; 0 takes the most probable token (default: the server's)"
    parser.add_argument("--temperature", type=heat, help=text)
    text = "Sample from the likeliest tokens of this total probability (default: the server's)"
    parser.add_argument("--top-p", type=fraction, help=text)
    word = Number(
        kind=int, rule="must be a whole number of 64 bits", low=-_INT64_LIMIT, high=_INT64_LIMIT - 1
    )
    parser.add_argument("--seed", type=word, help="Seed; an equal seed gives an equal text")
    parser.add_argument("--stop", action="append", help="End the output before this text")


def sampling_fields(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a streamed request's body that the sampling options set."""
    body: dict[str, Any] = {"max_tokens": args.max_tokens, "stream": True}
    body["stream_options"] = {"include_usage": True}
    for field in ("model", "temperature", "top_p", "seed", "stop"):
        if getattr(args, field) is not None:
            body[field] = getattr(args, field)
    return body


def run(args: argparse.Namespace) -> int:
    """Print the completion as it arrives, or with ``--json`` one document at the end."""
    prompt = read_stdin() if args.text == "-" else args.text
    if not prompt:
        raise CommandError(ExitCode.USAGE, "the prompt is empty: at least one character is needed")
    body = {"prompt": prompt, **sampling_fields(args)}
    answer = {"schema": 1, **stream_text(Client(args), "/v1/completions", body, not args.json)}
    if args.json:
        write_json(answer)
    return ExitCode.OK


def stream_text(
    client: Client, path: str, body: dict[str, Any], show: bool, *, may_interrupt: bool = False
) -> dict[str, Any]:
    """Stream a completion; return ``text``, ``finish_reason`` and ``usage``.

    ``show``: print the text as it arrives. ``may_interrupt``: Ctrl-C ends the output with the
    finish reason ``INTERRUPTED``. Raises ``CommandError``, also if the stream ends early.
    """
    answer: dict[str, Any] = {"text": "", "finish_reason": None, "usage": None}
    try:
        for event in client.stream(path, body):
            if "error" in event:
                raise CommandError(ExitCode.FAILED, str(event["error"]["message"]))
            answer["usage"] = event.get("usage") or answer["usage"]
            for choice in event["choices"]:
                _add_choice(answer, choice, show)
    except KeyboardInterrupt:
        if not may_interrupt:
            raise
        answer["finish_reason"] = INTERRUPTED
    if answer["finish_reason"] is None:
        raise CommandError(ExitCode.FAILED, "the stream ended before the text was finished")
    if show:
        write_result("\n")
    return answer


def _add_choice(answer: dict[str, Any], choice: Mapping[str, Any], show: bool) -> None:
    piece = choice["delta"].get("content") or "" if "delta" in choice else choice["text"]
    answer["text"] += piece
    answer["finish_reason"] = choice["finish_reason"] or answer["finish_reason"]
    if show:
        write_result(piece)
