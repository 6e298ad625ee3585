"""A whole cluster in one process: the real controller, sockets and workers, threads for actors.

Everything but Ray is what is served with: control sockets, handshakes, edges, step headers, the
engine stream. Layout matrices run on it in seconds.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import grpc

from cluster.config import (
    ClusterConfig,
    EngineSection,
    ModelSection,
    TransportSection,
    WorkersSection,
)
from cluster.controller_actor import ControllerActor
from cluster.resources import NodeResources, WorkerShare
from cluster.topology import Member, Role
from protos import engine_pb2 as pb
from protos import engine_pb2_grpc
from workers.attention_runtime import AttentionRuntime
from workers.checkpoint import Checkpoint
from workers.expert_runtime import ExpertRuntime
from workers.request import FinishReason, Request, TokenOutput
from workers.runtime import WorkerArgs, WorkerRuntime
from workers.wire import request_to_wire, step_from_wire

TIMEOUT_S = 60.0
"""Longest wait for anything here."""
TOKEN = "test-token"
"""Cluster token of all clusters made here."""


def make_config(
    checkpoint: Path,
    num_attention: int = 1,
    num_experts: int = 2,
    *,
    workers: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
    transport: Mapping[str, Any] | None = None,
    **model: Any,
) -> ClusterConfig:
    """A configuration with sections overridden by name."""
    pools = {"num_attention_workers": num_attention, "num_expert_workers": num_experts}
    return ClusterConfig(
        model=ModelSection(path=str(checkpoint), served_model_name="model", **model),
        workers=WorkersSection(**(pools | dict(workers or {}))),
        engine=EngineSection(**({"kv_cache_bytes": 16 << 20} | dict(engine or {}))),
        transport=TransportSection(**({"detection_limit_s": 20.0} | dict(transport or {}))),
        cluster_token=TOKEN,
    )


class ThreadWorkerGroup:
    """``WorkerGroupLike`` whose workers are threads of this process."""

    def __init__(self) -> None:
        self.runtimes: dict[str, WorkerRuntime] = {}
        self.deaths: list[str] = []

    def resources(self) -> tuple[NodeResources, ...]:
        return (NodeResources(node_id="here", address="127.0.0.1", cpus=2.0),)

    def free_cpus(self) -> float:
        return 2.0

    def address(self) -> str:
        return "127.0.0.1"

    async def reserve(
        self, num_attention: int, num_experts: int, share: WorkerShare, limit_s: float
    ) -> tuple[Member, ...]:
        roles: list[tuple[Role, int]] = [
            *(("attention", i) for i in range(num_attention)),
            *(("expert", i) for i in range(num_experts)),
        ]
        return tuple(
            Member(name=f"{role}-{i}", role=role, rank=i, device=i if role == "expert" else -1)
            for role, i in roles
        )

    async def start(
        self,
        members: Sequence[Member],
        config: Mapping[str, Any],
        control_address: str,
        extras: Mapping[str, Mapping[str, Any]],
    ) -> None:
        for member in members:
            kind = AttentionRuntime if member.role == "attention" else ExpertRuntime
            args = WorkerArgs.from_plain(
                config, asdict(member), control_address, extras[member.name], "127.0.0.1"
            )
            runtime = kind(args, self.deaths.append)
            self.runtimes[member.name] = runtime
            runtime.start()

    async def watch(
        self, is_connected: Callable[[str], bool], on_died: Callable[[str, str], None]
    ) -> None:
        return None

    async def end(self, names: Sequence[str]) -> None:
        for name in names:
            runtime = self.runtimes.pop(name, None)
            if runtime is not None:
                await asyncio.to_thread(runtime.stop)

    async def end_all(self) -> None:
        await self.end(list(self.runtimes))


class EngineStream:
    """A gateway's end of one engine stream, in a thread of its own."""

    def __init__(self, address: str, token: str = TOKEN) -> None:
        self._outgoing: queue.Queue[pb.ToEngine | None] = queue.Queue()
        self._incoming: queue.Queue[TokenOutput | Exception] = queue.Queue()
        self._channel = grpc.insecure_channel(address)
        self._outgoing.put(pb.ToEngine(hello=pb.Hello(token=token, gateway="test")))
        self._call = engine_pb2_grpc.EngineStub(self._channel).Stream(self._messages())
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def send(self, request: Request) -> None:
        """Hand a request over."""
        self._outgoing.put(pb.ToEngine(request=request_to_wire(request)))

    def abort(self, request_id: str) -> None:
        """Give a request up."""
        self._outgoing.put(pb.ToEngine(abort=pb.Abort(request_id=request_id)))

    def next(self, timeout_s: float = TIMEOUT_S) -> TokenOutput:
        """The next output of any request."""
        output = self._incoming.get(timeout=timeout_s)
        if isinstance(output, Exception):
            raise output
        return output

    def finish(self, requests: Sequence[Request]) -> dict[str, Result]:
        """Send requests and collect everything until all choices have ended."""
        for request in requests:
            self.send(request)
        return self.collect(requests)

    def collect(self, requests: Sequence[Request]) -> dict[str, Result]:
        """Outputs of requests that were sent, until all choices have ended."""
        results = {r.request_id: Result(r.n) for r in requests}
        left = sum(r.n for r in requests)
        while left:
            output = self.next()
            if output.request_id in results:
                left -= results[output.request_id].add(output)
        return results

    def close(self) -> None:
        """End the stream."""
        self._outgoing.put(None)
        self._call.cancel()  # type: ignore[no-untyped-call]
        self._channel.close()
        self._thread.join(TIMEOUT_S)

    def _messages(self) -> Iterator[pb.ToEngine]:
        while (message := self._outgoing.get()) is not None:
            yield message

    def _read(self) -> None:
        try:
            for message in self._call:
                if message.HasField("step"):
                    for output in step_from_wire(message.step).outputs:
                        self._incoming.put(output)
        except grpc.RpcError as err:
            self._incoming.put(ConnectionError(str(err)))


@dataclass(slots=True)
class Result:
    """What came back for one request, by choice."""

    n: int
    tokens: list[list[int]]
    outputs: list[TokenOutput]
    reasons: list[FinishReason | None]

    def __init__(self, n: int) -> None:
        self.n = n
        self.tokens = [[] for _ in range(n)]
        self.outputs = []
        self.reasons = [None] * n

    def add(self, output: TokenOutput) -> bool:
        """Take an output; True when it ends its choice. Tokens must come in order, once each."""
        tokens = self.tokens[output.choice]
        if output.token_ids:
            assert output.index == len(tokens), (output, len(tokens))
        tokens.extend(output.token_ids)
        self.outputs.append(output)
        if output.finish_reason is not None:
            assert self.reasons[output.choice] is None, "a choice ended twice"
            self.reasons[output.choice] = output.finish_reason
        return output.finish_reason is not None


class ThreadCluster:
    """One running cluster; see ``thread_cluster``."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config
        self.group = ThreadWorkerGroup()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.actor: ControllerActor = self._call(self._make_actor())

    def start(self) -> None:
        """Start all workers and wait until they serve. Raises ``RuntimeError`` with the error."""
        banks = [
            {"bank": b.bank, "layer": b.layer, "num_experts": b.num_experts}
            for b in Checkpoint(Path(self.config.model.path)).family.banks
        ]
        self._call(self.actor.start(self.config.to_dict(), banks))
        self.wait(lambda s: s["state"] in ("SERVING", "STOPPED"))
        if self.snapshot()["state"] == "STOPPED":
            raise RuntimeError(self.snapshot()["error"])

    def snapshot(self, fresh: bool = False) -> dict[str, Any]:
        """The controller's snapshot."""
        snapshot: dict[str, Any] = self._call(self.actor.snapshot(fresh))
        return snapshot

    def wait(self, is_so: Callable[[dict[str, Any]], bool], fresh: bool = False) -> dict[str, Any]:
        """Wait until a snapshot is as asked for."""
        deadline = time.monotonic() + TIMEOUT_S
        snapshot = self.snapshot(fresh)
        while not is_so(snapshot):
            if time.monotonic() > deadline:
                raise TimeoutError(f"never so: {snapshot}")
            if fresh:
                snapshot = self.snapshot(fresh)
            else:
                snapshot = self._call(self.actor.wait_snapshot(snapshot["version"], 1.0))
        return snapshot

    def stream(self, rank: int = 0) -> EngineStream:
        """A new engine stream to one attention worker."""
        workers = self.snapshot()["workers"]
        (address,) = [
            w["engine_address"] for w in workers if w["role"] == "attention" and w["rank"] == rank
        ]
        return EngineStream(address)

    def blocks_leaked(self) -> int:
        """KV blocks of all attention workers that are in use now."""
        workers = [w for w in self.snapshot(fresh=True)["workers"] if w["role"] == "attention"]
        return sum(w["kv_blocks_total"] - w["kv_blocks_free"] for w in workers)

    def stop(self) -> None:
        """End everything."""
        self._call(self.actor.stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(TIMEOUT_S)
        self._loop.close()

    async def _make_actor(self) -> ControllerActor:
        return ControllerActor(self.group)

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(TIMEOUT_S)


@contextmanager
def thread_cluster(config: ClusterConfig) -> Iterator[ThreadCluster]:
    """A cluster that serves, ended afterwards."""
    cluster = ThreadCluster(config)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def with_params(request: Request, **params: Any) -> Request:
    """A request with sampling parameters replaced."""
    return replace(request, params=replace(request.params, **params))
