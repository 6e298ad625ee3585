"""``run-batch``: sends the requests of a file to a running cluster and writes the responses."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp

from cluster.batches.requests import BatchRequest, RequestFile
from cluster.batches.response_file import ResponseFile
from cluster.batches.run import BatchCounts, BatchResponse, BatchRun, UnreachableError
from cluster.cli.terminal.arguments import MAX_COUNT, CommandParsers, Number, count, seconds
from cluster.cli.terminal.client import Client, response_error
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import note, show
from cluster.cli.terminal.progress import Progress
from cluster.core.checks import finite_or_text
from cluster.core.errors import ConflictError, RequestError

_CONCURRENCY = 32
_GIVE_UP_S = 600.0
_PRIORITY = 1
_REFUSED = (401, 403)
"""HTTP statuses of a rejected API key, with which every further request would fail too."""


def add_commands(commands: CommandParsers) -> None:
    parser = commands.add("run-batch", run, "send the requests of a file and write the responses")
    parser.add_argument("requests", type=Path, help="File of requests, one JSON object per line")
    text = "File for the responses; requests that have a response in it are not sent again"
    parser.add_argument("answers", type=Path, help=text)
    text = "Maximum number of concurrent requests"
    parser.add_argument("--concurrency", type=count, default=_CONCURRENCY, help=text)
    word = Number(kind=int, rule="must be a whole number of 32 bits", low=-(2**31), high=MAX_COUNT)
    text = "Priority of requests without one: lower runs first, other clients' default is 0"
    parser.add_argument("--priority", type=word, default=_PRIORITY, help=text)
    text = "Time in seconds for which the server may be unreachable before the command gives up"
    parser.add_argument("--give-up-after", type=seconds, default=_GIVE_UP_S, help=text)


def run(args: argparse.Namespace) -> int:
    """Send all requests of the batch; return ``FAILED`` if any of them got an error response."""
    try:
        counts = asyncio.run(_run(args))
    except RequestError as err:
        raise CommandError(ExitCode.USAGE, f"{args.requests}: {err.message}") from err
    except ConflictError as err:
        raise CommandError(ExitCode.REFUSED, str(err)) from err
    except OSError as err:
        raise CommandError(
            ExitCode.FAILED, f"{err.filename or args.answers}: {err.strerror}"
        ) from err
    document = {"schema": 1, "total": counts.total, "completed": counts.completed}
    document["failed"] = counts.failed
    text = f"{counts.completed} of {counts.total} requests answered in {args.answers}"
    if counts.failed:
        text += f", {counts.failed} refused or failed"
    show(args, document, text)
    return ExitCode.FAILED if counts.failed else ExitCode.OK


async def _run(args: argparse.Namespace) -> BatchCounts:
    requests = RequestFile.check(args.requests)
    client = Client(args)
    with ResponseFile(args.answers) as answers, Progress() as progress:
        async with _Sender(client, args.priority, args.concurrency) as sender:
            batch = BatchRun(
                requests,
                answers,
                answers,
                sender.send,
                args.concurrency,
                args.give_up_after,
                lambda counts: progress.update(_progress_text(counts)),
            )
            if batch.counts.left < batch.counts.total:
                note(f"{batch.counts.total - batch.counts.left} requests already have responses")
            try:
                await batch.run()
            except ExceptionGroup as group:  # Python 3.11.3 wraps what ``except*`` raises
                error = group.exceptions[0]
                if isinstance(error, UnreachableError):
                    text = f"{error}; {_progress_text(batch.counts)}; rerun to send the others"
                    raise CommandError(ExitCode.UNREACHABLE, text) from None
                raise error from None
        return batch.counts


def _progress_text(counts: BatchCounts) -> str:
    failed = f", {counts.failed} failed" if counts.failed else ""
    return f"{counts.completed} of {counts.total} requests answered{failed}"


class _Sender:
    def __init__(self, client: Client, priority: int, concurrency: int) -> None:
        self._url = client.url
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=concurrency, ssl=client.tls or True),
            headers={**client.headers, "x-priority": str(priority)},
            timeout=aiohttp.ClientTimeout(),  # none: the server has a limit
        )

    async def __aenter__(self) -> _Sender:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._session.close()

    async def send(self, request: BatchRequest) -> BatchResponse:
        """Send a request of the batch over HTTP.

        Raises ``UnreachableError``, and ``CommandError`` if the server rejects the API key.
        """
        try:
            async with self._session.post(self._url + request.url, json=request.body) as answer:
                text = await answer.read()
                headers = answer.headers
        except (aiohttp.ClientError, TimeoutError, OSError) as err:
            raise UnreachableError(f"{self._url} cannot be reached: {err}") from err
        if answer.status in _REFUSED:
            raise response_error(answer.status, text)
        pause = headers.get("retry-after", "")
        return BatchResponse(
            answer.status,
            _parsed(text),
            headers.get("x-request-id", ""),
            float(pause) if pause.isdecimal() else None,
        )


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text, parse_float=finite_or_text, parse_constant=str)
    except (ValueError, RecursionError):
        return text[:1024].decode(errors="replace")
