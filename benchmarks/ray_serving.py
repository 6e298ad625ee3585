"""A cluster of 1 attention and 1 expert worker for benchmarks, and a client of its engine stream.

The real controller, actors, sockets and stream; no gateway. Run it in a process of its own that
was started with ``cluster.local_ray.private_environment``.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self

import grpc

from cluster.config import ClusterConfig, ModelSection, WorkersSection
from cluster.errors import StartError
from cluster.local_ray import PrivateRay
from protos import engine_pb2 as pb
from protos import engine_pb2_grpc
from workers.request import Request, SamplingParams
from workers.wire import request_to_wire, step_from_wire

FOLDER_VARIABLE = "EXPERTMESH_BENCH_RAY"
"""Environment variable that names the folder from ``cluster.local_ray.make_temp_dir``."""
_START_LIMIT_S = 120.0
_CALL_LIMIT_S = 30.0
_TOKEN = "bench"
_NUM_WORKERS = 2


@contextmanager
def serving(checkpoint: Path) -> Iterator[str]:
    """Start Ray and the cluster; yields the engine address, ends everything afterwards.

    Raises ``StartError`` with the cluster's own words.
    """
    private = PrivateRay(folder=Path(os.environ[FOLDER_VARIABLE]))
    private.start(num_cpus=_NUM_WORKERS, num_gpus=0)
    try:
        with _controller(checkpoint) as controller:
            yield _engine_address(controller)
    finally:
        private.stop()


@contextmanager
def _controller(checkpoint: Path) -> Iterator[Any]:
    import ray

    from cluster.controller_actor import create_controller
    from cluster.worker_group import WorkerGroup
    from workers.attention_worker import AttentionWorker
    from workers.checkpoint import Checkpoint
    from workers.expert_worker import ExpertWorker

    config = ClusterConfig(
        model=ModelSection(path=str(checkpoint), served_model_name="model", dtype="bfloat16"),
        workers=WorkersSection(
            num_attention_workers=1, num_expert_workers=1, cpus_per_worker=1.0, device="cpu"
        ),
        cluster_token=_TOKEN,
    )
    banks = [
        {"bank": b.bank, "layer": b.layer, "num_experts": b.num_experts}
        for b in Checkpoint(checkpoint).family.banks
    ]
    group = WorkerGroup(attention_class=AttentionWorker, expert_class=ExpertWorker)
    controller = create_controller(group)
    ray.get(controller.start.remote(config.to_dict(), banks), timeout=_START_LIMIT_S)
    try:
        yield controller
    finally:
        ray.get(controller.stop.remote(), timeout=_CALL_LIMIT_S)


def _engine_address(controller: Any) -> str:
    """Where the attention worker serves its stream, as soon as the cluster serves."""
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
            (worker,) = [w for w in snapshot["workers"] if w["role"] == "attention"]
            return str(worker["engine_address"])
    raise StartError("cluster", f"not serving after {_START_LIMIT_S:g} s")


class EngineClient:
    """What a gateway is to the engine; notes when tokens come."""

    def __init__(self, address: str) -> None:
        self._outgoing: queue.Queue[pb.ToEngine | None] = queue.Queue()
        self._outgoing.put(pb.ToEngine(hello=pb.Hello(token=_TOKEN, gateway="bench")))
        self._channel = grpc.insecure_channel(address)
        self._call = engine_pb2_grpc.EngineStub(self._channel).Stream(
            iter(self._outgoing.get, None)
        )
        self._num_batches = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._outgoing.put(None)
        self._call.cancel()  # type: ignore[no-untyped-call]
        self._channel.close()

    def generate(self, prompts: list[list[int]], new_tokens: int) -> list[list[float]]:
        """Seconds to each token, by sequence. Raises ``RuntimeError`` when a request fails."""
        self._num_batches += 1
        places = {f"{self._num_batches}-{i}": i for i in range(len(prompts))}
        params = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        times: list[list[float]] = [[] for _ in prompts]
        start = perf_counter()
        for name, i in places.items():
            request = Request(request_id=name, prompt=tuple(prompts[i]), params=params)
            self._outgoing.put(pb.ToEngine(request=request_to_wire(request)))
        left = len(prompts)
        for message in self._call:
            now = perf_counter() - start
            for output in step_from_wire(message.step).outputs:
                if output.error:
                    raise RuntimeError(output.error)
                times[places[output.request_id]] += [now] * len(output.token_ids)
                left -= output.finish_reason is not None
            if not left:
                return times
        raise RuntimeError("the engine stream ended")
