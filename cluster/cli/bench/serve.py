"""``bench serve``: puts load on a running server and measures latency and throughput."""

from __future__ import annotations

import argparse
import asyncio
import math
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cluster.cli.bench import compare
from cluster.cli.bench.document import add_save, document_of, shown, tell
from cluster.cli.bench.load import Load, RequestFailed, Target, run_load, warm_up
from cluster.cli.bench.tally import MEASURES, Tally
from cluster.cli.terminal.arguments import Commands, add_model_option, count, positive
from cluster.cli.terminal.client import Client, tls_files
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import table
from cluster.cli.terminal.progress import Progress

LIMIT_S = 600.0
"""Limit of one request without ``--timeout``."""
_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E latency"}
_TICK_S = 0.2


def add_commands(commands: Commands) -> None:
    kinds = commands.add_group("bench", "measure a server")
    add_command(kinds)
    compare.add_command(kinds)


def add_command(kinds: Commands) -> None:
    parser = kinds.add("serve", run, "load on a running server, streamed completions")
    add_model_option(parser)
    parser.add_argument("--num-prompts", type=count, default=100, help="requests")
    text = "mean requests a second, Poisson arrivals; inf sends all at once"
    parser.add_argument(
        "--request-rate", type=positive, default=math.inf, metavar="NUMBER", help=text
    )
    parser.add_argument("--max-concurrency", type=count, default=256, help="requests at once")
    for name, default, what in (("input", 128, "prompt"), ("output", 64, "answer")):
        text = f"tokens of each {what}"
        parser.add_argument(f"--random-{name}-len", type=count, default=default, help=text)
    text = "use gRPC, at this address (default: the address that the server reports)"
    parser.add_argument("--grpc", nargs="?", const="", metavar="HOST:PORT", help=text)
    parser.add_argument("--seed", type=int, default=0, help="of prompts and gaps")
    parser.add_argument(
        "--goodput",
        nargs="+",
        type=_goal,
        default=[],
        metavar="NAME:MS",
        help=f"good requests a second, by {', '.join(MEASURES)}; itl: no gap is longer",
    )
    add_save(parser)


def _goal(text: str) -> tuple[str, float]:
    name, _, value = text.partition(":")
    try:
        goal = float(value)
    except ValueError:
        goal = 0.0
    if name not in MEASURES or not goal > 0:
        raise argparse.ArgumentTypeError(f"must be {'|'.join(MEASURES)}:MS")
    return name, goal


@dataclass
class _Measured:
    """The measurement so far; complete, or cut by an interrupt."""

    tally: Tally
    load: Load | None = None
    began: float = 0.0
    """When the first request that counts was sent."""


def run(args: argparse.Namespace) -> int:
    """Measure and print; exits with 1 if a request failed, with 130 after a ctrl-C."""
    found = _Measured(Tally(dict(args.goodput)))
    is_interrupted = False
    progress = Progress()
    try:
        asyncio.run(_measure(args, found, progress))
    except KeyboardInterrupt:
        is_interrupted = True
    finally:
        progress.clear()
    duration_s = time.monotonic() - found.began
    if found.load is not None:
        document = _document(args, found.load, found, duration_s, is_interrupted)
        tell(args, document, _text(document))
    if is_interrupted:
        return ExitCode.INTERRUPTED
    return ExitCode.FAILED if found.tally.failures else ExitCode.OK


async def _measure(args: argparse.Namespace, found: _Measured, progress: Progress) -> None:
    timeout_s = args.timeout or LIMIT_S
    target, vocab_size = await _open(args, timeout_s)
    load = Load(
        num_prompts=args.num_prompts,
        request_rate=args.request_rate,
        max_concurrency=args.max_concurrency,
        input_len=args.random_input_len,
        output_len=args.random_output_len,
        vocab_size=vocab_size,
        seed=args.seed,
        timeout_s=timeout_s,
    )
    shown_at = 0.0

    def tick() -> None:
        nonlocal shown_at
        if time.monotonic() - shown_at >= _TICK_S:
            shown_at = time.monotonic()
            progress.update(f"{found.tally.ended} of {load.num_prompts} requests")

    try:
        progress.update("warming up")
        await warm_up(load, target)
        found.load, found.began = load, time.monotonic()
        await run_load(load, target, found.tally, tick)
    finally:
        await target.close()


async def _open(args: argparse.Namespace, timeout_s: float) -> tuple[Target, int]:
    """The server, and the tokens of its model."""
    client = Client(args)
    salt = f"bench-{uuid.uuid4().hex}"  # the same prompts as before must be computed anew
    status: Mapping[str, Any] = {} if args.grpc else client.get("/cluster/v1/status")
    if args.grpc is None:
        from cluster.cli.bench.http_target import HttpTarget  # slow to import

        vocab_size = _vocab_size(status)
        return HttpTarget(client, args.model, salt), vocab_size
    found = [each["grpc"] for each in status.get("gateway", ()) if "grpc" in each]
    address = args.grpc or next(iter(found), "")
    if not address:
        raise CommandError(ExitCode.REFUSED, "the server has no gRPC address: give one with --grpc")
    from cluster.cli.bench.grpc_target import GrpcTarget  # slow to import

    files = tls_files(args)
    target = GrpcTarget(
        address,
        headers=client.headers,
        tls_files=files if client.tls or any(files.values()) else None,
        model=args.model,
        cache_salt=salt,
        timeout_s=timeout_s,
    )
    try:
        return target, await target.vocab_size()
    except RequestFailed:
        await target.close()
        raise


def _vocab_size(status: Mapping[str, Any]) -> int:
    try:
        return int(status["model"]["vocab_size"])
    except (KeyError, TypeError) as err:
        message = f"the cluster is {status.get('state', 'no cluster')}: its model is not known yet"
        raise CommandError(ExitCode.NOT_READY, message) from err


def _document(
    args: argparse.Namespace, load: Load, found: _Measured, duration_s: float, interrupted: bool
) -> dict[str, Any]:
    options = {**asdict(load), "protocol": "http" if args.grpc is None else "grpc"}
    if not math.isfinite(load.request_rate):
        options["request_rate"] = None
    return document_of(
        "bench serve",
        {**options, "goodput_ms": dict(found.tally.goals_ms)},
        found.tally.results(duration_s),
        url=args.grpc or Client(args).url,
        interrupted=interrupted,
    )


def _text(document: Mapping[str, Any]) -> str:
    """Rows, then a table of times."""
    results = document["results"]
    rows = [
        ("Successful requests", results["successful"]),
        ("Failed requests", results["failed"]),
        *((f"  {code}", number) for code, number in results["failures"].items()),
        *([("Unfinished requests", results["unfinished"])] if document["interrupted"] else []),
        ("Duration (s)", shown(results["duration_s"])),
        ("Prompt tokens", results["prompt_tokens"]),
        ("Output tokens", results["output_tokens"]),
        ("Peak concurrency", results["peak_concurrency"]),
        ("Requests/s", shown(results["requests_per_s"])),
        ("Output tokens/s", shown(results["output_tokens_per_s"])),
        ("All tokens/s", shown(results["tokens_per_s"])),
    ]
    if results["good_requests_per_s"] is not None:
        rows.append(("Good requests/s", shown(results["good_requests_per_s"])))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name + ':':<{width + 1}}  {value}" for name, value in rows]
    times = [
        (_NAMES[name], *(shown(results[f"{name}_ms"][key]) for key in ("mean", "median", "p99")))
        for name in MEASURES
    ]
    return "\n".join([*lines, "", table(("MILLISECONDS", "MEAN", "MEDIAN", "P99"), times)])
