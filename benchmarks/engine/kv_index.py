"""Index of KV blocks and routing: ``python -m benchmarks.engine.kv_index [--json]``.

A gateway's real index and router with the cached blocks of 64 attention workers. Prints the memory
of a block in bytes, and times in microseconds:

    event           a worker's message with 64 stored and 64 removed blocks, mean and longest
    lookup          search of a prompt of 10,000 blocks, of which each worker has some
    end of worker   what runs at once when a worker ends
    route           assignment of a request with this prompt to one of the workers
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import ParamSpec

import psutil

from benchmarks.harness.paced_engine import hello_of
from cluster.cli.terminal.arguments import count
from cluster.cli.terminal.output import table
from cluster.core.errors import ExpertMeshError
from gateway.cluster.view import AttentionEndpoint
from gateway.engines.assignment_queue import AssignmentQueue
from gateway.engines.disconnects import DisconnectResolver
from gateway.engines.engine_client import EngineClient
from gateway.engines.engine_stream import EngineStream
from gateway.engines.request_router import RequestRouter
from gateway.engines.router import RoutingPolicy
from gateway.engines.stream_events import StreamEvents
from gateway.engines.submission import Submission
from gateway.engines.worker_registry import WorkerRegistry
from workers.requests.block_hash import SHORT_BYTES, KvEvents
from workers.requests.request import Request, SamplingParams, TokenOutput

Arguments = ParamSpec("Arguments")
NUM_WORKERS = 64
_PROMPT_BLOCKS = 10_000
_BLOCKS = 64
"""Blocks of an event."""
_REPEATS = 200


@dataclass(frozen=True, slots=True)
class IndexCost:
    """One number."""

    what: str
    members: int
    """Number of cached blocks of all workers."""
    us: float
    """Microseconds, or bytes for ``memory of a block``."""


class _Sink:
    """Takes no outputs."""

    def put(self, output: TokenOutput) -> None:
        """Ignore an output."""

    def fail(self, error: ExpertMeshError) -> None:
        """Raise the error of a request that could not be assigned."""
        raise error


class Router:
    """The router of a gateway with connected workers, of which none sends or receives."""

    def __init__(self, num_workers: int, policy: RoutingPolicy = RoutingPolicy.KV) -> None:
        self.workers = WorkerRegistry()
        self._router = RequestRouter(self.workers, policy)
        self.kv = self._router.kv
        self._queue = AssignmentQueue(
            self.workers, self._router, DisconnectResolver(), lambda entry: None
        )
        for rank in range(num_workers):
            endpoint = AttentionEndpoint(f"attention-{rank:02}", "", 1)
            stream = EngineStream(endpoint, token="", gateway="")
            stream.hello = hello_of(endpoint.name)
            client = EngineClient(stream, StreamEvents(lambda event: None))
            client.load.fetch_cost = 0.1
            self.workers.clients[endpoint.name] = client

    def assign(self, number: int, hashes: Sequence[bytes]) -> Submission:
        """Assign a request with a prompt of these blocks to a worker."""
        request = Request(
            request_id=f"r{number}", prompt=(5, 6, 7), params=SamplingParams(max_tokens=100)
        )
        entry = Submission(request, _Sink(), time.monotonic() + 600.0)
        entry.prompt_hashes = hashes
        self._queue.waiting.append(entry)
        self._queue.assign_waiting()
        return entry


def _names(draw: random.Random, number: int) -> tuple[bytes, ...]:
    return tuple(draw.randbytes(SHORT_BYTES) for _ in range(number))


def _taken_us(
    work: Callable[Arguments, object], *args: Arguments.args, **kwargs: Arguments.kwargs
) -> float:
    began = time.perf_counter_ns()
    work(*args, **kwargs)
    return (time.perf_counter_ns() - began) / 1e3


def measure(num_blocks: int) -> list[IndexCost]:
    """Return all costs of an index with ``num_blocks`` blocks."""
    draw, router, process = random.Random(1), Router(NUM_WORKERS), psutil.Process()
    index, names = router.kv, [client.worker for client in router.workers.ready]
    prompt = _names(draw, _PROMPT_BLOCKS)
    newest: dict[str, list[tuple[bytes, ...]]] = {name: [] for name in names}
    gc.disable()  # of the process that measures
    before = process.memory_info().rss
    for place, name in enumerate(names):
        depth = _PROMPT_BLOCKS * place // NUM_WORKERS
        index.apply(name, KvEvents(number=0, is_whole=True, stored=prompt[:depth]))
    num_events = num_blocks // NUM_WORKERS // _BLOCKS
    for number in range(1, num_events + 1):
        for name in names:
            stored = _names(draw, _BLOCKS)
            newest[name] = [*newest[name][-3:], stored]
            index.apply(name, KvEvents(number=number, stored=stored))
    memory = (process.memory_info().rss - before) / max(index.num_blocks, 1)
    events_us = []
    for number in range(num_events + 1, num_events + 1 + max(num_events // 4, 4)):
        for name in names:
            removed, stored = newest[name].pop(0), _names(draw, _BLOCKS)
            newest[name].append(stored)
            changes = KvEvents(number=number, stored=stored, removed=removed)
            events_us.append(_taken_us(index.apply, name, changes))
    lookups_us = [_taken_us(index.matches, prompt) for _ in range(_REPEATS)]
    routes_us = [_taken_us(router.assign, i, prompt[:64]) for i in range(_REPEATS)]
    long_us = [_taken_us(router.assign, -1 - i, prompt) for i in range(20)]
    costs = {
        "memory of a block": memory,
        "event": statistics.fmean(events_us),
        "longest event": max(events_us),
        "lookup": statistics.median(lookups_us),
        "end of worker": _taken_us(index.drop, names[-1]),
        "route, 64 blocks": statistics.median(routes_us),
        "route, 10,000 blocks": statistics.median(long_us),
    }
    gc.enable()
    return [IndexCost(what, num_blocks, round(us, 1)) for what, us in costs.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all costs, and print a row for each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.kv_index")
    parser.add_argument("--blocks", type=count, default=10_000_000, metavar="N")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each row")
    args = parser.parse_args(arguments)
    found = [asdict(cost) for cost in measure(args.blocks)]
    if args.json:
        sys.stdout.writelines(json.dumps(row) + "\n" for row in found)
    else:
        rows = [[row["what"], row["us"]] for row in found]
        sys.stdout.write(table(["INDEX", f"US, {args.blocks:,} BLOCKS"], rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
