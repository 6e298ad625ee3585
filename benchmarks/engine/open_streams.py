"""Open streams of one gateway: ``python -m benchmarks.engine.open_streams [--json]``.

A gateway, a worker without a model and a client, each in a process of its own, over sockets on
loopback. All streams are open at the same time, and the worker sends tokens at a fixed rate, the
next one always to the stream that has waited longest. Prints

    memory      of the gateway's process, without streams and with all of them
    added       from a step of the worker until the client has received its tokens
    CPU         of the gateway for each token

With several gateways, each serves its share of the streams on a port that they share.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

import psutil
import uvloop

from benchmarks.harness.distributed import free_ports
from benchmarks.harness.engine_stream import TOKEN
from benchmarks.harness.paced_engine import WORKER, PacedEngine
from benchmarks.harness.stream_client import GrpcStreams, HttpStreams
from cluster.cli.terminal.arguments import count
from cluster.cli.terminal.output import table
from cluster.config.cluster import ClusterConfig
from cluster.config.gateway import GatewaySection
from cluster.config.model import ModelSection
from cluster.core.errors import NotReadyError
from cluster.core.release import RELEASE
from cluster.launch.model_source import bundled_checkpoint
from gateway.app import tune_process
from gateway.calls.gateway import Gateway
from gateway.cluster.view import ControllerCall, ControllerCalls, SnapshotFollower
from gateway.engines.engine_pool import EnginePool
from gateway.grpc.server import GrpcServer
from gateway.listener.connection_limits import raise_file_limit
from gateway.listener.http_listener import HttpListener
from gateway.protocols import build_public_app
from gateway.text.tokenizer import load_tokenizer

Protocol = Literal["http", "grpc"]
TOKENS_PER_S = 2000
_LIMIT_S = 120.0
_END_LIMIT_S = 5.0
_WARM_UP_S = 1.0
"""Shortest time before it, as the first token of a stream costs more."""
_LEAST_S = 5.0
"""Shortest measured time."""
_DRAIN_S = 1.0
"""Seconds for which the client reads after the last step."""


@dataclass(frozen=True, slots=True)
class OpenStreams:
    """Cost of open streams."""

    what: str
    """``open streams over http`` or ``grpc``."""
    members: int
    """Number of open streams of all gateways."""
    us: float
    """CPU time of all gateways for each token, in microseconds."""
    gateways: int
    memory_mb: float
    """Memory of the largest gateway in MB."""
    empty_mb: float
    """Its memory without streams in MB."""
    added_p50_ms: float
    added_p99_ms: float
    """Time from a step of the worker until the client has received its tokens."""
    opened_per_s: float
    """Streams that were opened per second."""


class _Controller:
    """A controller whose cluster never changes."""

    def __init__(self, address: str) -> None:
        worker = {"name": WORKER, "role": "attention", "rank": 0, "pid": 1, "state": "SERVING"}
        self._snapshot = {
            "release": RELEASE,
            "version": 1,
            "term": 1,
            "generation": 1,
            "state": "SERVING",
            "workers": [{**worker, "engine_address": address}],
        }

    async def call(self, call: ControllerCall, *details: Any) -> Any:
        """Answer polls; other calls are not implemented."""
        if call != "wait_snapshot":
            raise NotReadyError(f"{call} has no answer")
        if details[0] >= 1:
            await asyncio.sleep(details[1])
        return self._snapshot


def _worker(pipe: Connection, num_streams: int, tokens_per_s: int) -> None:
    """Process of the worker: sends its address, then serves the commands ``accept`` and ``run``."""
    gc.disable()  # a pause of this process would count as one of the gateway
    engine = PacedEngine(num_streams, tokens_per_s)
    pipe.send(engine.start())
    while (command := pipe.recv()) is not None:
        if command == "accept":
            engine.accept_all(_LIMIT_S - 10.0)
        else:
            engine.run(command)
        pipe.send((engine.num_per_step, engine.sent_s))
    engine.stop()


def _gateway(pipe: Connection, address: str, section: GatewaySection) -> None:
    """Process of a gateway: sends a message when it is ready, and ends when it receives one."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as in Ray's actors
        runner.run(_serve(pipe, address, section))


async def _serve(pipe: Connection, address: str, section: GatewaySection) -> None:
    path = str(bundled_checkpoint())
    config = ClusterConfig(
        model=ModelSection(path=path, served_model_name="model"),
        gateway=section,
        cluster_token=TOKEN,
    )

    async def find() -> ControllerCalls:
        return _Controller(address)

    view, engines = SnapshotFollower(find), EnginePool(TOKEN, "gateway")
    gateway = Gateway(config, load_tokenizer(path), view, engines)
    limits = raise_file_limit()
    grpc_server = GrpcServer(gateway, section.host, section.grpc_port, limits.grpc)
    await grpc_server.start()
    http = HttpListener(
        build_public_app(gateway),
        section,
        "HTTP",
        section.host,
        section.port,
        max_connections=limits.http,
        is_shared=True,
    )
    await http.start()
    view.start()
    while gateway.readiness.not_ready_reasons() or gateway.model.facts is None:
        await asyncio.sleep(0.01)
    tune_process()
    pipe.send(None)
    await asyncio.to_thread(pipe.recv)
    view.stop()
    await asyncio.gather(http.stop(), grpc_server.stop(0))
    await engines.stop()
    await gateway.close()


def _client(pipe: Connection, protocol: Protocol, port: int, num_streams: int) -> None:
    """Process of the client: opens the streams, and reads until the pipe has a message."""
    gc.disable()
    kind: type[HttpStreams | GrpcStreams] = HttpStreams if protocol == "http" else GrpcStreams
    streams = kind(port, num_streams)
    pipe.send(None)
    streams.open(pipe.poll)
    pipe.recv()
    pipe.send(None)
    while not pipe.poll():
        streams.read(0.1)
    pipe.recv()
    pipe.send(streams.received)
    streams.close()


@contextmanager
def _process(work: Callable[..., None], *args: object) -> Iterator[tuple[Connection, int]]:
    """Run ``work`` in a process; yields its pipe and its process id."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    try:
        yield mine, process.pid or 0
    finally:
        with contextlib.suppress(OSError):
            mine.send(None)
        process.join(_END_LIMIT_S)
        process.kill()
        process.join()


def _receive(pipe: Connection) -> Any:
    if not pipe.poll(_LIMIT_S):
        raise TimeoutError("a process does not answer")
    return pipe.recv()


def measure(
    protocol: Protocol, num_streams: int, num_gateways: int = 1, tokens_per_s: int = TOKENS_PER_S
) -> OpenStreams:
    """Open the streams, and measure two tokens of each after the first."""
    port, grpc_port = free_ports(2)
    section = GatewaySection(
        port=port,
        grpc_port=grpc_port,
        max_queue=num_streams,
        max_queue_wait_s=0,
        num_gateway_replicas=num_gateways,
    )
    round_s = num_streams / tokens_per_s
    with ExitStack() as stack:
        worker, _ = stack.enter_context(_process(_worker, num_streams, tokens_per_s))
        address = _receive(worker)
        gateways: list[psutil.Process] = []
        for _ in range(num_gateways):
            pipe, pid = stack.enter_context(_process(_gateway, address, section))
            _receive(pipe)
            gateways.append(psutil.Process(pid))
        empty = max(one.memory_info().rss for one in gateways)
        used_port = port if protocol == "http" else grpc_port
        client, _ = stack.enter_context(_process(_client, protocol, used_port, num_streams))
        _receive(client)
        began_s = time.monotonic()
        _ask(worker, "accept")
        opened_s = time.monotonic() - began_s
        _ask(client, None)
        _, warm = _ask(worker, max(round_s, _WARM_UP_S))
        cpu_s = _cpu_s(gateways)
        per_step, sent_s = _ask(worker, max(2 * round_s, _LEAST_S))
        cpu_s = _cpu_s(gateways) - cpu_s
        time.sleep(_DRAIN_S)
        memory = max(one.memory_info().rss for one in gateways)
        received = _ask(client, None)
    added_s = _added_s(received, num_streams, per_step, sent_s)[len(warm) * per_step :]
    cuts = statistics.quantiles(added_s, n=100)
    return OpenStreams(
        what=f"open streams over {protocol}",
        members=num_streams,
        us=round(1e6 * cpu_s / len(added_s), 1),
        gateways=num_gateways,
        memory_mb=round(memory / 1e6),
        empty_mb=round(empty / 1e6),
        added_p50_ms=round(1e3 * cuts[49], 2),
        added_p99_ms=round(1e3 * cuts[98], 2),
        opened_per_s=round(num_streams / opened_s),
    )


def _added_s(
    received: Sequence[tuple[int, float]], num_streams: int, per_step: int, sent_s: Sequence[float]
) -> list[float]:
    """Return the added latency of each token. Raises ``RuntimeError`` unless each came once."""
    numbers: Counter[int] = Counter()
    added_s = [-1.0] * (per_step * len(sent_s))
    for place, now_s in received:
        number = numbers[place] * num_streams + place
        numbers[place] += 1
        added_s[number] = now_s - sent_s[number // per_step]
    if min(added_s) < 0.0 or len(received) != len(added_s):
        raise RuntimeError(f"{len(received)} events came for {len(added_s)} tokens")
    return added_s


def _cpu_s(processes: Sequence[psutil.Process]) -> float:
    return sum(sum(one.cpu_times()[:2]) for one in processes)


def _ask(pipe: Connection, message: object) -> Any:
    pipe.send(message)
    return _receive(pipe)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.open_streams")
    parser.add_argument("--streams", type=count, nargs="+", default=(100, 10_000), metavar="N")
    parser.add_argument("--gateways", type=count, default=1, metavar="N")
    parser.add_argument("--protocol", choices=("http", "grpc"), default="http")
    parser.add_argument("--tokens-per-s", type=count, default=TOKENS_PER_S, metavar="N")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each row")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each number of streams, and print a row for each."""
    args = make_parser().parse_args(arguments)
    most_files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    found = [
        asdict(measure(args.protocol, number, args.gateways, args.tokens_per_s))
        for number in args.streams
    ]
    if args.json:
        sys.stdout.writelines(json.dumps(row) + "\n" for row in found)
        return 0
    heads = [name.upper().replace("_", " ") for name in found[0]]
    sys.stdout.write(table(heads, [list(row.values()) for row in found]) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
