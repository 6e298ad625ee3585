"""A cluster of two workers for benchmarks, by default 1 + 1, and a client of its engine streams.

The real controller, actors, sockets and stream; no gateway. Run it in a process of its own that
was started with ``cluster.launch.local_ray.private_environment``.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import grpc

from cluster.config.cluster import ClusterConfig
from cluster.core.errors import StartError
from cluster.core.release import RELEASE
from cluster.core.topology import Role
from cluster.launch.local_ray import PrivateRay
from workers.process.worker.actor import ACTOR_CLASSES, WorkerActor
from workers.requests.request import Request, SamplingParams, StepOutput
from workers.requests.stream_handshake import GatewayHandshake
from workers.requests.wire import (
    FROM_ENGINE,
    PATH,
    TO_ENGINE,
    FromEngine,
    ToEngine,
)

FOLDER_VARIABLE = "EXPERTMESH_BENCH_RAY"
"""Environment variable that names the folder from ``cluster.launch.local_ray.make_temp_dir``."""
_START_LIMIT_S = 280.0
_CALL_LIMIT_S = 30.0
_ANSWER_LIMIT_S = 120.0
TOKEN = "bench"
"""Of these clusters."""
_NUM_WORKERS = 2


@contextmanager
def serving(checkpoint: Path, **sections: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Start Ray and the cluster; yields the engine addresses, ends everything afterwards.

    ``sections`` override the configuration's, ``engine={"num_micro_batches": 2}``. Raises
    ``StartError`` with the cluster's own words.
    """
    private = PrivateRay(folder=Path(os.environ[FOLDER_VARIABLE]))
    private.start(num_cpus=_NUM_WORKERS, num_gpus=0)
    try:
        with controlled(checkpoint, sections) as controller:
            yield engine_addresses(controller)
    finally:
        private.stop()


@contextmanager
def controlled(
    checkpoint: Path,
    sections: Mapping[str, Mapping[str, Any]],
    classes: Mapping[Role, type[WorkerActor]] | None = None,
) -> Iterator[Any]:
    """The controller of a cluster; ``classes`` replaces actor classes of the product by role."""
    import ray

    from cluster.actors.controller_client import create_controller
    from cluster.actors.worker_group import WorkerGroup
    from workers.model.loading.checkpoint import Checkpoint

    plain: dict[str, Mapping[str, Any]] = {
        "model": {"path": str(checkpoint), "served_model_name": "model", "dtype": "bfloat16"},
        "workers": {"num_expert_workers": 1, "cpus_per_worker": 1.0, "device": "cpu"},
        "engine": {"enable_prefix_caching": False},  # prompts come again in a repetition
    }
    merged = {n: {**plain.get(n, {}), **sections.get(n, {})} for n in (*plain, *sections)}
    config = ClusterConfig.from_dict({**merged, "cluster_token": TOKEN})
    banks = [
        {"bank": b.bank, "layer": b.layer, "num_experts": b.num_experts}
        for b in Checkpoint(checkpoint).family.banks
    ]
    group = WorkerGroup({**ACTOR_CLASSES, **(classes or {})})
    controller = create_controller(group)
    ray.get(controller.start.remote(config.to_dict(), banks), timeout=_START_LIMIT_S)
    try:
        yield controller
    finally:
        ray.get(controller.stop.remote(), timeout=_CALL_LIMIT_S)


def engine_addresses(controller: Any) -> tuple[str, ...]:
    """Where workers serve their streams, by rank, as soon as the cluster serves."""
    import ray

    version = -1
    deadline = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < deadline:
        call = controller.wait_snapshot.remote(version, 1.0)
        snapshot = ray.get(call, timeout=_CALL_LIMIT_S)
        version = int(snapshot["version"])
        if snapshot["state"] == "STOPPED":
            raise StartError("cluster", str(snapshot["error"]))
        if snapshot["state"] == "SERVING":
            addresses = [str(w["engine_address"]) for w in snapshot["workers"]]
            return tuple(address for address in addresses if address)
    raise StartError("cluster", f"not serving after {_START_LIMIT_S:g} s")


@dataclass(frozen=True, slots=True)
class Received:
    """A message of an engine, or the end of its stream."""

    at: float
    """When it came, as ``perf_counter`` counts."""
    message: FromEngine | None
    """None at the end."""


class Stream:
    """One engine stream, read by a thread of its own."""

    def __init__(self, address: str, received: queue.SimpleQueue[Received]) -> None:
        self.outgoing: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
        """What is sent; None ends it."""
        self._handshake = GatewayHandshake(TOKEN, "bench", RELEASE)
        self._proof: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(address)
        self._call = self._channel.stream_stream(PATH, bytes, bytes)(self._messages())
        self._thread = threading.Thread(target=self._read, args=(received,), daemon=True)
        self._thread.start()

    def _messages(self) -> Iterator[bytes]:
        yield self._handshake.start()
        yield self._proof.get()
        while (message := self.outgoing.get()) is not None:
            yield TO_ENGINE.encode(message)

    def _read(self, received: queue.SimpleQueue[Received]) -> None:
        try:
            answers = iter(self._call)
            self._proof.put(self._handshake.prove(next(answers)))
            self._handshake.finish(next(answers))
            for data in answers:
                received.put(Received(perf_counter(), FROM_ENGINE.decode(data)))
        except grpc.RpcError:
            pass  # cancelled, or the engine is gone: an end either way
        received.put(Received(perf_counter(), None))

    def close(self) -> None:
        """End it."""
        self.outgoing.put(None)
        self._call.cancel()  # type: ignore[no-untyped-call]
        self._thread.join(_CALL_LIMIT_S)
        self._channel.close()


class EngineClient:
    """What a gateway is to the engines; notes when tokens come. Requests go to them round-robin."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._received: queue.SimpleQueue[Received] = queue.SimpleQueue()
        self._streams = [Stream(address, self._received) for address in addresses]
        self._num_batches = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for stream in self._streams:
            stream.close()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
        """Seconds to each token, by sequence. Raises ``RuntimeError`` when a request fails."""
        self._num_batches += 1
        places = {f"{self._num_batches}-{i}": i for i in range(len(prompts))}
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        times: list[list[float]] = [[] for _ in prompts]
        start = perf_counter()
        for name, i in places.items():
            request = Request(request_id=name, prompt=tuple(prompts[i]), params=params)
            stream = self._streams[i % len(self._streams)]
            stream.outgoing.put(request)
        left = len(prompts)
        while left:
            received = self._received.get(timeout=_ANSWER_LIMIT_S)
            if received.message is None:
                raise RuntimeError("the engine stream ended")
            if not isinstance(received.message, StepOutput):
                continue
            for output in received.message.outputs:
                if output.error:
                    raise RuntimeError(output.error)
                times[places[output.request_id]] += [received.at - start] * len(output.token_ids)
                left -= output.finish_reason is not None
        return times
