"""Whole clusters for tests: in one process (threads for actors), or on a running Ray.

Both use the real controller, control sockets, handshakes, edges, step headers and engine stream.
The threads make layout matrices run in seconds; Ray adds real processes.
"""

from __future__ import annotations

import asyncio
import atexit
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError

from benchmarks.harness.engine_stream import TIMEOUT_S, TOKEN, EngineStream, Result
from benchmarks.harness.stalls import Limit
from benchmarks.harness.worker_group import LocalWorkerGroup
from cluster.actors.controller_actor import ControllerActor
from cluster.actors.controller_client import create_controller
from cluster.actors.worker_group import WorkerGroup
from cluster.config.cluster import ClusterConfig, EngineSection
from cluster.config.gateway import GatewaySection
from cluster.config.kv_events import KvEventsSection
from cluster.config.kv_tiers import KvTiersSection
from cluster.config.lora import LoraSection
from cluster.config.model import ModelSection
from cluster.config.observability import ObservabilitySection
from cluster.config.transport import TransportSection
from cluster.config.workers import WorkersSection
from cluster.controller.controller import Controller
from cluster.core.topology import Member, Role
from cluster.launch import local_ray
from cluster.launch.teardown import end_leftovers
from cluster.sizing.start_plan import ExistingWorker, StartPlan
from expertmesh.loop_thread import LoopThread
from workers.model.loading.checkpoint import Checkpoint
from workers.process.roles.attention import AttentionRole
from workers.process.worker.actor import ACTOR_CLASSES, WorkerActor
from workers.process.worker.worker import Worker
from workers.process.worker_args import WorkerArgs
from workers.requests.request import Request

WAIT_LIMIT_S = 3 * TIMEOUT_S
"""Longest wait for a state; new actors take long on a busy machine."""
QUIET_S = 10.0
"""Detection limit where no test causes a fault: many workers share one process."""


def make_config(
    checkpoint: Path,
    num_attention: int = 1,
    num_experts: int = 2,
    *,
    workers: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
    transport: Mapping[str, Any] | None = None,
    observability: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
    kv_events: Mapping[str, Any] | None = None,
    kv_tiers: Mapping[str, Any] | None = None,
    **model: Any,
) -> ClusterConfig:
    """A configuration with sections overridden by name.

    In colocated mode (``workers={"mode": "colocated"}``) ``num_experts`` workers do both.
    """
    pools: dict[str, Any] = {"num_expert_workers": num_experts}
    if (workers or {}).get("mode") != "colocated":
        pools["num_attention_workers"] = num_attention
    return ClusterConfig(
        model=ModelSection(path=str(checkpoint), served_model_name="model", **model),
        workers=WorkersSection(**(pools | dict(workers or {}))),
        engine=EngineSection(**({"kv_cache_bytes": 16 << 20} | dict(engine or {}))),
        transport=TransportSection(**({"detection_limit_s": QUIET_S} | dict(transport or {}))),
        observability=ObservabilitySection(**(observability or {})),
        lora=LoraSection(**({"lora_roots": ("/",)} | dict(lora or {}))),
        kv_events=KvEventsSection(**(kv_events or {})),
        kv_tiers=KvTiersSection(**(kv_tiers or {})),
        gateway=GatewaySection(max_queue_wait_s=0.0),  # on a busy machine requests wait for longer
        cluster_token=TOKEN,
    )


class ServingCluster(ABC):
    """One cluster, seen through its controller."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config = config

    @abstractmethod
    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the controller actor and wait for its result."""

    def start(self) -> None:
        """Start all workers and wait until they serve. Raises ``RuntimeError`` with the error."""
        has_predictor = self.config.speculation.has_predictor
        checkpoint = Checkpoint(Path(self.config.model.path), has_predictor=has_predictor)
        banks = [
            {"bank": b.bank, "layer": b.layer, "num_experts": b.num_experts}
            for b in checkpoint.family.banks
        ]
        self.call("start", self.config.to_dict(), banks)
        self.wait(lambda s: s["state"] in ("SERVING", "STOPPED"))
        if self.snapshot()["state"] == "STOPPED":
            raise RuntimeError(self.snapshot()["error"])

    def snapshot(self, fresh: bool = False) -> dict[str, Any]:
        """The controller's snapshot."""
        snapshot: dict[str, Any] = self.call("snapshot", fresh)
        return snapshot

    def wait(self, is_so: Callable[[dict[str, Any]], bool], fresh: bool = False) -> dict[str, Any]:
        """Wait until a snapshot is as asked for."""
        limit = Limit(WAIT_LIMIT_S)
        snapshot = self.snapshot(fresh)
        while not is_so(snapshot):
            if limit.is_over():
                raise TimeoutError(f"never so: {snapshot}")
            known = snapshot["version"]
            snapshot = self.snapshot(True) if fresh else self.call("wait_snapshot", known, 1.0)
        return snapshot

    def worker(self, name: str) -> dict[str, Any]:
        """One worker's entry in the snapshot."""
        (entry,) = [w for w in self.snapshot()["workers"] if w["name"] == name]
        found: dict[str, Any] = entry
        return found

    def stream(self, rank: int = 0) -> EngineStream:
        """A new engine stream to one attention rank, which may be a colocated worker."""
        role = "colocated" if self.config.workers.mode == "colocated" else "attention"
        return EngineStream(self.worker(f"{role}-{rank}")["engine_address"])

    def answers(self, asked: Sequence[Request]) -> dict[str, Result]:
        """Serve requests together, spread over the attention ranks."""
        num_ranks = self.config.workers.num_attention_ranks
        streams = [self.stream(rank) for rank in range(num_ranks)]
        shares = [asked[rank::num_ranks] for rank in range(num_ranks)]
        for stream, share in zip(streams, shares, strict=True):
            for request in share:
                stream.send(request)
        results: dict[str, Result] = {}
        for stream, share in zip(streams, shares, strict=True):
            results |= stream.collect(share)
            stream.close()
        return results

    def blocks_in_use(self) -> int:
        """KV blocks with a holder, on all workers that are not lost."""
        found = self.snapshot(fresh=True)["workers"]
        workers = [w for w in found if w["kv_blocks_total"] and w["state"] != "LOST"]
        return sum(w["kv_blocks_total"] - w["kv_blocks_free"] for w in workers)

    def stop(self) -> None:
        """End everything."""
        self.call("stop")


class ThreadCluster(ServingCluster):
    """The controller in an event loop of its own, workers as threads unless ``group`` differs."""

    def __init__(self, config: ClusterConfig, group: ThreadWorkerGroup | None = None) -> None:
        super().__init__(config)
        self.group = group or ThreadWorkerGroup()
        self.thread = LoopThread(TIMEOUT_S)
        self.loop = self.thread.loop
        self.actor: ControllerActor = self.thread.run(self._make_actor())

    @property
    def controller(self) -> Controller:
        """The one that runs now; only for the event loop, but for reads."""
        assert self.actor.runner.controller is not None
        return self.actor.runner.controller

    def crash_controller(self) -> None:
        """The controller is gone without a word."""

        async def crash() -> None:
            self.actor._background.cancel()
            if self.actor.runner.server is not None:
                await self.actor.runner.server.close()

        self.thread.run(crash())

    def break_connection(self, worker: str) -> None:
        """The network resets the connection of a worker to the controller."""

        async def reset() -> None:
            assert self.actor.runner.server is not None
            self.actor.runner.server._workers[worker].writer.transport.abort()

        self.thread.run(reset())

    def restore(self) -> None:
        """Another controller takes the place of the one that crashed."""

        async def restore() -> ControllerActor:
            actor = ControllerActor(self.group, status_limit_s=TIMEOUT_S)
            await actor.restore()
            return actor

        self.group.restarted = True
        self.actor = self.thread.run(restore())

    def stop(self) -> None:
        super().stop()
        self.thread.close()

    async def _make_actor(self) -> ControllerActor:
        return ControllerActor(self.group, status_limit_s=TIMEOUT_S)

    def call(self, method: str, *arguments: Any) -> Any:
        return self.thread.run(getattr(self.actor, method)(*arguments))


class ThreadWorkerGroup(LocalWorkerGroup):
    """Workers are threads of this process; those of a role may be of another class."""

    def __init__(
        self,
        worker_class: type[Worker] = Worker,
        by_role: Mapping[Role, type[Worker]] | None = None,
    ) -> None:
        super().__init__()
        self._worker_class = worker_class
        self._by_role = by_role or {}
        self.workers: dict[str, Worker] = {}
        self.deaths: list[str] = []

    def names(self) -> list[str]:
        return list(self.workers)

    async def start(self, members: Sequence[Member], plan: StartPlan, address: str) -> None:
        for member in members:
            args = WorkerArgs.from_plain(*plan.arguments(member, address), "127.0.0.1")
            worker = self.make_worker(args)
            self.workers[member.name] = worker
            worker.start()

    def make_worker(self, args: WorkerArgs) -> Worker:
        """One worker; not started yet."""
        kind = self._by_role.get(args.member.role, self._worker_class)
        return kind(args, self.deaths.append)

    def attention(self, name: str) -> AttentionRole:
        """The attention role of a worker that is loaded."""
        role = self.workers[name].roles.attention
        assert role is not None
        return role

    async def find(self, limit_s: float) -> tuple[ExistingWorker, ...]:
        return tuple(
            ExistingWorker(
                name=name,
                config=worker.config,
                num_slots=worker.args.num_slots,
            )
            for name, worker in self.workers.items()
            if worker.is_alive
        )

    async def redirect(self, name: str, control_address: str) -> None:
        self.workers[name].control.redirect(control_address, *self.claimed)

    async def end(self, names: Sequence[str]) -> None:
        for name in names:
            worker = self.workers.pop(name, None)
            if worker is not None:
                await asyncio.to_thread(worker.stop)


class RayCluster(ServingCluster):
    """Real actors on the Ray that this process is connected to."""

    def __init__(
        self, config: ClusterConfig, classes: Mapping[Role, type[WorkerActor]] = ACTOR_CLASSES
    ) -> None:
        super().__init__(config)
        self.actor = create_controller(WorkerGroup(classes), status_limit_s=TIMEOUT_S)

    def stop(self) -> None:
        super().stop()
        end_leftovers()

    def call(self, method: str, *arguments: Any) -> Any:
        """Also through a restart of the controller, which the callers in a test do not mind."""
        limit = Limit(TIMEOUT_S)
        while True:
            try:
                call = getattr(self.actor, method).remote(*arguments)
                return ray.get(call, timeout=TIMEOUT_S)
            except ActorUnavailableError:
                if limit.is_over():
                    raise
                time.sleep(0.05)


_SHARED = ExitStack()


@contextmanager
def connected_ray(**options: Any) -> Iterator[None]:
    """A private Ray of two CPUs for this process; ``options`` as for ``ray.init``.

    Without options it is the same one for the whole session, since a start takes seconds.
    """
    if not options:
        if not ray.is_initialized():
            _begin_shared_ray()
        try:
            yield
        finally:
            end_leftovers()
        return
    end_shared_ray()
    with tempfile.TemporaryDirectory(prefix="em", dir="/tmp") as folder:
        local_ray.init_ray(Path(folder), num_cpus=2, **options)
        yield
        ray.shutdown()


def _begin_shared_ray() -> None:
    atexit.register(end_shared_ray)
    folder = _SHARED.enter_context(tempfile.TemporaryDirectory(prefix="em", dir="/tmp"))
    _SHARED.callback(ray.shutdown)
    local_ray.init_ray(Path(folder), num_cpus=2)


def end_shared_ray() -> None:
    """End the session's Ray, if there is one; needed before a test begins another."""
    _SHARED.close()


@contextmanager
def serving(cluster: ServingCluster) -> Iterator[ServingCluster]:
    """Start a cluster, end it afterwards."""
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
