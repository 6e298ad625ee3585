"""The same load on two servers, in turns: what else happens on the machines meets both alike."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from typing import Any

from cluster.cli.bench.load import warm_up
from cluster.cli.bench.load_options import load_of
from cluster.cli.bench.measurement import Measurement
from cluster.cli.bench.targets import http_target
from cluster.cli.terminal.client import Client
from cluster.cli.terminal.progress import Progress


def measure_both(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Documents of ``bench serve`` for the servers ``args.a`` and ``args.b``.

    Raises ``CommandError``, also where a server does not answer at all.
    """
    clients = [Client(argparse.Namespace(**{**vars(args), "url": url})) for url in (args.a, args.b)]
    found = [Measurement(args) for _ in clients]
    progress = Progress()
    try:
        asyncio.run(_measure(args, clients, found, progress))
    finally:
        progress.clear()
    a, b = (m.document(client.url) for m, client in zip(found, clients, strict=True))
    return a, b


async def _measure(
    args: argparse.Namespace,
    clients: list[Client],
    found: list[Measurement],
    progress: Progress,
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        opened = []
        for client in clients:
            opened.append(http_target(args, client))
            stack.push_async_callback(opened[-1][0].close)
        # Both get the same prompts, which must be tokens of both models.
        load = load_of(args, min(vocab_size for _, vocab_size in opened))
        for target, _ in opened:
            progress.update("warming up")
            await warm_up(load, target)
        for turn, part in enumerate(load.parts(args.rounds)):
            for place in (0, 1) if turn % 2 == 0 else (1, 0):
                await found[place].run(load, part, opened[place][0], progress)
