"""Runs one workload on two servers in turn, so that other load on the machines affects both."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from typing import Any

from cluster.cli.bench.measurement import Measurement, warn_if_late
from cluster.cli.bench.targets import http_target
from cluster.cli.bench.workload import warm_up
from cluster.cli.bench.workload_options import make_workload
from cluster.cli.terminal.client import Client
from cluster.cli.terminal.progress import Progress


def measure_both(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure the servers ``args.a`` and ``args.b``; return a ``bench serve`` document of each.

    After Ctrl-C the documents have the results so far, if each server has run a part. Raises
    ``CommandError``, also if a server does not respond at all.
    """
    a_args = _settings(args, url=args.a)
    b_args = _settings(args, url=args.b, model=args.b_model or args.model)
    servers = [
        (a_args, Client(a_args)),
        (b_args, Client(b_args, key=args.b_api_key or "")),  # never the key of A
    ]
    found = [Measurement(each) for each, _ in servers]
    try:
        with Progress() as progress:
            asyncio.run(_measure(servers, found, progress, args.rounds))
    except KeyboardInterrupt:
        if any(one.load is None for one in found):
            raise
        for one in found:
            one.is_interrupted = True
    a, b = (one.document(each.url) for one, (each, _) in zip(found, servers, strict=True))
    for document in (a, b):
        warn_if_late(document)
    return a, b


def _settings(args: argparse.Namespace, **others: Any) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **others})


async def _measure(
    servers: list[tuple[argparse.Namespace, Client]],
    found: list[Measurement],
    progress: Progress,
    rounds: int,
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        opened = []
        for each, client in servers:
            opened.append(http_target(each, client))
            stack.push_async_callback(opened[-1][0].close)
        # both get the same prompts, whose tokens must exist in both models
        load = make_workload(servers[0][0], min(vocab_size for _, vocab_size in opened))
        for target, _ in opened:
            progress.update("warming up")
            await warm_up(load, target)
        for turn, part in enumerate(load.parts(rounds)):
            for place in (0, 1) if turn % 2 == 0 else (1, 0):
                await found[place].run(load, part, opened[place][0], progress)
