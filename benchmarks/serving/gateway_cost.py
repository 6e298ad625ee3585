"""Cost of the gateway: tokens a second and time to the first token, compared with the engine's.

python -m benchmarks.gateway_cost  prints the numbers as JSON

One attention and two expert workers serve the bundled model; one client process runs on the same
cores. It sends the same requests over the engine stream (without a gateway), over gRPC, over HTTP,
and over HTTP through Ray Serve's own proxy. The paths take turns. For single requests the order is
random in each turn, so that leftover work of one request delays all paths alike.

The second table splits the mean time to the first token, using the gateway's metrics. The third
table has the CPU time of each process during the batches of streams.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from http.client import HTTPConnection
from time import perf_counter

import grpc
import grpc.experimental
import httpx
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from benchmarks.harness.distributed import free_ports
from benchmarks.harness.processes import cpu_seconds
from benchmarks.harness.ray_serving import TOKEN, EngineClient
from benchmarks.harness.serving_cluster import RayCluster, connected_ray, make_config, serving
from benchmarks.report.quiet import wait_until_quiet
from benchmarks.report.results import table
from cluster.launch.local_ray import common_environment
from cluster.launch.model_source import bundled_checkpoint
from cluster.launch.readiness import wait_ready
from gateway.app import APP_NAME, build_app
from gateway.observability.metrics import PREFIX
from protos.inference_pb2 import GenerateRequest
from protos.inference_pb2_grpc import InferenceStub
from protos.types_pb2 import SamplingParams, TokenIds

_ANSWER_LIMIT_S = 120.0
_PROMPT_TOKENS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Sizes of the measurement."""

    num_streams: int = 32
    """Streams at once, for throughput."""
    new_tokens: int = 128
    """Tokens of each stream."""
    runs: int = 5
    """Measured batches on each path."""
    num_single: int = 600
    """Single requests on each path on an idle cluster, for the time to the first token."""
    patience_s: float = 10.0
    """Longest wait before a batch for other processes to be quiet."""


QUICK = Case(num_streams=2, new_tokens=4, runs=1, num_single=3, patience_s=0.0)
"""Enough to see that everything runs."""

WAYS = {"engine": "engine stream", "grpc": "gRPC", "http": "HTTP", "serve": "HTTP, Serve's proxy"}
"""Key of each path in the results -> its label in the tables."""
STAGES = ("engine", "gateway and engine stream", "client, network and proxy")
"""Parts of the time to the first token."""
_LEAST_CPU_MS = 10.0
"""Processes that use less for 1,000 tokens on every path are not shown."""

Times = list[list[float]]
"""For each sequence, seconds from the start of the batch to each delta."""
Numbers = dict[str, dict[str, float]]
"""Path -> name of a number -> value."""


@dataclass(frozen=True, slots=True)
class Way:
    """A path on which requests reach the engine."""

    together: Callable[[Sequence[list[int]], int], Times]
    """Run prompts at the same time with a number of new tokens each; returns the times."""
    first_s: Callable[[list[int]], float]
    """Run one prompt and return the seconds to its first token. The client blocks on a connection
    that stays open, to keep its own cost low."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Results of a run."""

    ways: Numbers
    """``tokens_per_s``, ``first_ms`` and ``first_p99_ms`` of each path."""
    stages: Numbers
    """Parts of the time to the first token in ms, for the paths through the gateway."""
    cpu: Numbers
    """CPU time of each process in ms for 1,000 tokens of a batch."""


def section(quick: bool) -> str:
    """Return the Markdown section."""
    case = QUICK if quick else Case()
    found = measure(case)
    about, where = (" ".join(part.split()) for part in (__doc__ or "").split("\n\n")[2:4])
    words = (
        f"Tokens a second: {case.num_streams} streams of {case.new_tokens} tokens, median of "
        f"{case.runs} batches. First token: {case.num_single} single requests on an idle cluster."
    )
    parts = ["## Cost of the gateway", f"{about} {words}", _costs(found), where]
    return "\n\n".join([*parts, _stages(found), _processes(found)])


def _costs(found: Found) -> str:
    engine = found.ways["engine"]
    rows = [
        [
            WAYS[way],
            f"{numbers['tokens_per_s']:.0f}",
            f"{numbers['tokens_per_s'] / engine['tokens_per_s']:.2f}",
            f"{numbers['first_ms']:.2f} / {numbers['first_p99_ms']:.2f}",
            f"{numbers['first_ms'] - engine['first_ms']:.2f}"
            f" / {numbers['first_p99_ms'] - engine['first_p99_ms']:.2f}",
        ]
        for way, numbers in found.ways.items()
    ]
    head = [
        "path",
        "tokens/s",
        "ratio to the engine stream",
        "first token, median / p99, ms",
        "added to the first token, median / p99, ms",
    ]
    return table(head, rows)


def _stages(found: Found) -> str:
    rows = [
        [WAYS[way], *(f"{stages[name]:.2f}" for name in STAGES)]
        for way, stages in found.stages.items()
    ]
    return table(["part of the first token's time, ms", *STAGES], rows)


def _processes(found: Found) -> str:
    runs = found.cpu
    names = sorted({n for cpu in runs.values() for n, ms in cpu.items() if ms >= _LEAST_CPU_MS})
    rows = [[WAYS[way], *(f"{cpu.get(n, 0.0):.0f}" for n in names)] for way, cpu in runs.items()]
    return table(["CPU time for 1,000 tokens, ms", *names], rows)


def measure(case: Case) -> Found:
    """Measure all paths."""
    speeds: defaultdict[str, list[float]] = defaultdict(list)
    firsts: defaultdict[str, list[float]] = defaultdict(list)
    cpu: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    with _ways() as (ways, scrape):
        for run in range(case.runs + 1):
            for name, way in ways.items():
                wait_until_quiet(time.monotonic() + case.patience_s)
                prompts = [_prompt(run, i) for i in range(case.num_streams)]
                before, start = cpu_seconds(), perf_counter()
                way.together(prompts, case.new_tokens)
                seconds = perf_counter() - start
                if run:  # the first one warms up
                    speeds[name].append(case.num_streams * case.new_tokens / seconds)
                    for process, used in cpu_seconds().items():
                        cpu[name][process] += used - before.get(process, 0.0)
        order, draw = list(ways), random.Random(1)
        for number in range(case.num_single):
            draw.shuffle(order)
            for name in order:
                firsts[name].append(_first_ms(ways[name], number))
        stages = {
            name: _where_it_goes(way, case.num_single, scrape)
            for name, way in ways.items()
            if name != "engine"
        }
    thousands = case.runs * case.num_streams * case.new_tokens / 1e3
    return Found(
        ways={
            name: {
                "tokens_per_s": statistics.median(speeds[name]),
                "first_ms": statistics.median(firsts[name]),
                "first_p99_ms": statistics.quantiles(firsts[name], n=100)[98],
            }
            for name in ways
        },
        stages=stages,
        cpu={
            name: {process: 1e3 * s / thousands for process, s in own.items()}
            for name, own in cpu.items()
        },
    )


def _first_ms(way: Way, number: int) -> float:
    return way.first_s(_prompt(-1 - number, 0)) * 1e3


def _where_it_goes(
    way: Way, num_single: int, scrape: Callable[[], Mapping[str, float]]
) -> dict[str, float]:
    """Mean of each stage in ms, from the gateway's own histograms."""
    before = scrape()
    total = statistics.fmean(_first_ms(way, num_single + i) for i in range(num_single))
    after = scrape()
    mean = {name: 1e3 * (after[name] - before[name]) / num_single for name in after}
    engine = mean["request_queue_time_seconds"] + mean["request_prefill_time_seconds"]
    gateway = mean["time_to_first_token_seconds"]
    return dict(zip(STAGES, (engine, gateway - engine, total - gateway), strict=True))


def _prompt(run: int, number: int) -> list[int]:
    """Token ids of the bundled model. No prompt is a prefix of another one."""
    seed = (run * 1009 + number * 31) % 65521
    return [4 + (seed * (k + 3) + k * k) % 200 for k in range(_PROMPT_TOKENS)]


@contextmanager
def _ways() -> Iterator[tuple[dict[str, Way], Callable[[], dict[str, float]]]]:
    """All paths to one cluster, and a function that reads the sums of the gateway's histograms."""
    port, grpc_port, serve_port = free_ports(3)
    os.environ.update(common_environment())
    plain = make_config(bundled_checkpoint(), 1, 2, engine={"enable_prefix_caching": False})
    gateway = replace(plain.gateway, port=port, grpc_port=grpc_port)
    config = replace(plain, gateway=gateway, cluster_token=TOKEN)
    with connected_ray(), serving(RayCluster(config)) as cluster:
        workers = cluster.snapshot()["workers"]
        addresses = [w["engine_address"] for w in workers if w["engine_address"]]
        options = {"host": "127.0.0.1", "port": serve_port}
        serve.start(proxy_location="HeadOnly", http_options=options)
        serve.run(build_app(config.to_dict()), name=APP_NAME, route_prefix="/")
        loop = asyncio.new_event_loop()
        try:
            for each in (port, serve_port):
                wait_ready(f"http://127.0.0.1:{each}", gateway, list)
            with (
                EngineClient(addresses) as engine,
                closing(_HttpClient(port)) as http,
                closing(_HttpClient(serve_port)) as proxied,
            ):
                client = loop.run_until_complete(_GrpcClient.open(grpc_port))
                ways = {
                    "engine": Way(
                        lambda prompts, n: engine.generate(list(prompts), n),
                        lambda prompt: engine.generate([prompt], 2)[0][0],
                    ),
                    "grpc": Way(
                        lambda prompts, n: loop.run_until_complete(
                            _together(client.stream, prompts, n)
                        ),
                        client.first_s,
                    ),
                    "http": Way(
                        lambda prompts, n: loop.run_until_complete(
                            _together(http.stream, prompts, n)
                        ),
                        http.first_s,
                    ),
                    "serve": Way(
                        lambda prompts, n: loop.run_until_complete(
                            _together(proxied.stream, prompts, n)
                        ),
                        proxied.first_s,
                    ),
                }
                yield ways, lambda: _sums(f"http://127.0.0.1:{port}/metrics")
                loop.run_until_complete(client.close())
        finally:
            loop.close()
            serve.shutdown()  # type: ignore[no-untyped-call]


def _sums(url: str) -> dict[str, float]:
    """The sum of each histogram by its name without the prefix."""
    families = text_string_to_metric_families(httpx.get(url).raise_for_status().text)
    return {
        family.name.removeprefix(PREFIX): sample.value
        for family in families
        for sample in family.samples
        if sample.name == f"{family.name}_sum"
    }


async def _together(
    stream: Callable[[list[int], int, float], Awaitable[list[float]]],
    prompts: Sequence[list[int]],
    new_tokens: int,
) -> Times:
    start = perf_counter()
    work = asyncio.gather(*(stream(prompt, new_tokens, start) for prompt in prompts))
    return await asyncio.wait_for(work, _ANSWER_LIMIT_S)


class _GrpcClient:
    """The generated client: one channel for batches, one that blocks for single requests."""

    def __init__(self, channel: grpc.aio.Channel, target: str) -> None:
        self._channel = channel
        self._stub = InferenceStub(channel)
        # no second thread: the engine's client notes times in the thread that reads, too
        single = (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1)
        self._blocking = grpc.insecure_channel(target, options=[single])
        self._blocking_stub = InferenceStub(self._blocking)

    @classmethod
    async def open(cls, port: int) -> _GrpcClient:
        target = f"127.0.0.1:{port}"
        return cls(grpc.aio.insecure_channel(target), target)

    async def close(self) -> None:
        self._blocking.close()
        await self._channel.close(None)

    async def stream(self, prompt: list[int], new_tokens: int, start: float) -> list[float]:
        request = _grpc_request(prompt, new_tokens)
        return [perf_counter() - start async for _ in self._stub.GenerateStream(request)]

    def first_s(self, prompt: list[int]) -> float:
        start = perf_counter()
        chunks = self._blocking_stub.GenerateStream(_grpc_request(prompt, 2))
        first, *_ = [perf_counter() - start for _ in chunks]
        return first


def _grpc_request(prompt: list[int], new_tokens: int) -> GenerateRequest:
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
    return GenerateRequest(token_ids=TokenIds(ids=prompt), sampling_params=params)


class _HttpClient:
    """A minimal HTTP client, so that it takes little CPU time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._connection = HTTPConnection("127.0.0.1", port)

    def close(self) -> None:
        self._connection.close()

    async def stream(self, prompt: list[int], new_tokens: int, start: float) -> list[float]:
        body = _http_body(prompt, new_tokens)
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        times: list[float] = []
        while line := await reader.readline():
            if _is_token(line):
                times.append(perf_counter() - start)
        writer.close()
        if not times:
            raise RuntimeError("the stream ended before its first token")
        return times

    def first_s(self, prompt: list[int]) -> float:
        start = perf_counter()
        headers = {"Content-Type": "application/json"}
        self._connection.request("POST", "/v1/completions", _http_body(prompt, 2), headers)
        answer = self._connection.getresponse()
        while not _is_token(answer.readline()):
            pass
        first = perf_counter() - start
        answer.read()
        return first


def _http_body(prompt: list[int], new_tokens: int) -> bytes:
    fields = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    return json.dumps({**fields, "stream": True}).encode()


def _is_token(line: bytes) -> bool:
    """Whether a line has a token. Raises ``RuntimeError`` for an error or the stream's end."""
    if b'"error"' in line or not line:
        raise RuntimeError(line.decode() or "the stream ended before its first token")
    return line.startswith(b"data: {")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway_cost", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    options = parser.parse_args(arguments)
    found = measure(QUICK if options.quick else Case())
    sys.stdout.write(json.dumps(asdict(found)) + "\n")
