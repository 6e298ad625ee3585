"""``bench serve``: runs a workload on a server and measures latency and throughput."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Mapping
from typing import Any

from cluster.cli.bench import compare
from cluster.cli.bench.document import add_save, format_number, require_folder, show_and_save
from cluster.cli.bench.measurement import Measurement, warn_if_late
from cluster.cli.bench.targets import grpc_target, http_target
from cluster.cli.bench.workload import warm_up
from cluster.cli.bench.workload_options import add_workload_options, make_workload
from cluster.cli.terminal.arguments import CommandParsers
from cluster.cli.terminal.client import Client
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.cli.terminal.output import table
from cluster.cli.terminal.progress import Progress
from cluster.workload.tally import MEASURES

_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E latency"}
_COLUMNS = ("mean", "median", "p90", "p99")


def add_commands(commands: CommandParsers) -> None:
    kinds = commands.add_group("bench", "measure latency and throughput of a server")
    add_command(kinds)
    compare.add_command(kinds)


def add_command(kinds: CommandParsers) -> None:
    parser = kinds.add("serve", run, "send streamed completions to a running server and measure it")
    add_workload_options(parser)
    text = "Use gRPC instead of HTTP, at this address (default: as the server reports)"
    parser.add_argument("--grpc", nargs="?", const="", metavar="HOST:PORT", help=text)
    add_save(parser)


def run(args: argparse.Namespace) -> int:
    """Measure the server and print the results; return the exit code.

    The exit code is 1 if a request failed, and 130 after Ctrl-C.
    """
    require_folder(args.save)
    found = Measurement(args)
    try:
        with Progress() as progress:
            asyncio.run(_measure(args, found, progress))
    except KeyboardInterrupt:
        found.is_interrupted = True
    if found.load is not None:
        document = found.document(args.grpc or Client(args).url)
        show_and_save(args, document, _text(document))
        warn_if_late(document)
    if found.is_interrupted:
        return ExitCode.INTERRUPTED
    return ExitCode.FAILED if found.tally.failures else ExitCode.OK


async def _measure(args: argparse.Namespace, found: Measurement, progress: Progress) -> None:
    client = Client(args)
    opened = http_target(args, client) if args.grpc is None else await grpc_target(args, client)
    target, vocab_size = opened
    try:
        load = make_workload(args, vocab_size)
        progress.update("warming up")
        await warm_up(load, target)
        await found.run(load, load, target, progress)
    finally:
        await target.close()


def _text(document: Mapping[str, Any]) -> str:
    """Format the totals as rows, followed by a table of measured times."""
    results = document["results"]
    rows = [
        ("Successful requests", results["successful"]),
        ("Failed requests", results["failed"]),
        *((f"  {code}", number) for code, number in results["failures"].items()),
        *([("Unfinished requests", results["unfinished"])] if document["interrupted"] else []),
        ("Duration (s)", format_number(results["duration_s"])),
        ("Prompt tokens", results["prompt_tokens"]),
        ("Output tokens", results["output_tokens"]),
        ("Peak concurrency", results["peak_concurrency"]),
        ("Requests/s", format_number(results["requests_per_s"])),
        ("Output tokens/s", format_number(results["output_tokens_per_s"])),
        ("All tokens/s", format_number(results["tokens_per_s"])),
    ]
    if results["good_requests_per_s"] is not None:
        rows.append(("Good requests/s", format_number(results["good_requests_per_s"])))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name + ':':<{width + 1}}  {value}" for name, value in rows]
    times = [
        (_NAMES[name], *(format_number(results[f"{name}_ms"][key]) for key in _COLUMNS))
        for name in MEASURES
    ]
    return "\n".join([*lines, "", table(("MILLISECONDS", *map(str.upper, _COLUMNS)), times)])
