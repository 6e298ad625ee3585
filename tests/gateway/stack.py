"""A whole gateway on loopback, in a thread of its own: HTTP, gRPC, a scripted engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import httpx
from starlette.types import ASGIApp

from benchmarks.harness.stalls import wait_until
from cluster.config.cluster import ClusterConfig, EngineSection
from cluster.config.gateway import GatewaySection
from cluster.config.model import ModelSection
from cluster.config.observability import ObservabilitySection
from expertmesh.loop_thread import LoopThread
from gateway.admin.service import AdminApi
from gateway.calls.gateway import Gateway
from gateway.cluster.view import ControllerCalls, SnapshotFollower
from gateway.core.tuning import GatewayTuning
from gateway.engines.engine_pool import EnginePool
from gateway.engines.router import RoutingPolicy
from gateway.grpc.server import GrpcServer
from gateway.listener.http_listener import HttpListener
from gateway.protocols import build_public_app
from gateway.text.tokenizer import Tokenizer
from tests.gateway.fakes import (
    CLUSTER_TOKEN,
    FakeController,
    ScriptedEngine,
    attention_entry,
    counting_script,
    expert_entry,
    tiny_tokenizer,
)

MODEL = "tiny"
OTHER_MODEL = "other"
"""Name of the second model, where a stack has two."""
WAIT_S = 60.0
"""Longest wait for anything, on a machine that is busy with other work."""

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class FurtherModel:
    """A model beside the first one of a stack, with an engine and a controller of its own."""

    gateway: Gateway
    engine: ScriptedEngine
    controller: FakeController


class Stack:
    """Everything of one gateway; its coroutines run in a thread of its own."""

    def __init__(
        self,
        gateway_section: GatewaySection,
        tokenizer: Tokenizer | None,
        engine_section: EngineSection | None = None,
        silence_limit_s: float = WAIT_S,
        observability: ObservabilitySection | None = None,
        tuning: GatewayTuning | None = None,
        more_models: Mapping[str, Tokenizer | None] | None = None,
    ) -> None:
        self.config = ClusterConfig(
            model=ModelSection(path="/nowhere", served_model_name=MODEL),
            engine=engine_section or EngineSection(),
            gateway=gateway_section,
            observability=observability or ObservabilitySection(),
            cluster_token=CLUSTER_TOKEN,
        )
        self._tokenizer = tokenizer
        self._tuning = tuning
        self._more_models = more_models or {}
        self._silence_limit_s = silence_limit_s
        self._thread = LoopThread(WAIT_S)
        self.engine = ScriptedEngine()
        self.controller: FakeController
        self.gateway: Gateway
        self.engines: EnginePool
        self.url = ""
        self.http: httpx.Client
        self.grpc_server: GrpcServer
        self.grpc_target = ""
        self.admin: AdminApi
        self.others: dict[str, FurtherModel] = {}
        """The models beside the first one, by name."""
        self._closers: list[Callable[[], Coroutine[Any, Any, None]]] = []

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine on the loop, from another thread."""
        return self._thread.run(work)

    def call(self, function: Callable[[], object]) -> None:
        """Run a function on the loop, from another thread."""

        async def work() -> None:
            function()

        self.run(work())

    @contextlib.contextmanager
    def as_new(self) -> Iterator[None]:
        """The engines' defaults before, and nothing running afterwards."""
        engines = [self.engine, *(other.engine for other in self.others.values())]
        for engine in engines:
            engine.script, engine.step_s, engine.tokens_per_output = counting_script, 0.0, 1
            engine.is_paused, engine.error, engine.repeat_outputs = False, None, False
            engine.num_cached_tokens = 0
            engine.requests.clear()
            engine.aborts.clear()
        for controller in (self.controller, *(other.controller for other in self.others.values())):
            controller.drain_orders.clear()
        yield
        for engine in engines:
            engine.is_paused = False
        self.wait_for(
            lambda: not any(engine.running for engine in engines), "the end of all requests"
        )

    def wait_for(self, condition: Callable[[], bool], what: str = "a condition") -> None:
        """Wait until it holds."""
        wait_until(condition, what, WAIT_S)

    def start(self, serving: bool = True) -> None:
        """Start it all; with ``serving`` wait until it is ready."""
        self.run(self._start())
        self.http = httpx.Client(base_url=self.url, timeout=WAIT_S, verify=False)
        if serving:
            self.serve()

    def serve(self) -> None:
        """Let the clusters of all models be ready."""
        self.serve_one(self.gateway, self.engine, self.controller)
        for other in self.others.values():
            self.serve_one(other.gateway, other.engine, other.controller)

    def serve_one(
        self, gateway: Gateway, engine: ScriptedEngine, controller: FakeController
    ) -> None:
        """Let the cluster of one model be ready."""
        workers = [attention_entry(engine), expert_entry(0), expert_entry(1)]
        self.call(lambda: controller.change(state="SERVING", workers=workers))
        self.wait_for(lambda: not gateway.readiness.not_ready_reasons(), "readiness")

    def wait_no_requests(self) -> None:
        """Wait until every request has given its place in the queue back."""
        admission = self.gateway.admission.admission
        assert admission is not None
        self.wait_for(lambda: admission.num_requests == 0, "free places in the queue")

    def stop(self) -> None:
        """End it all."""
        self.http.close()
        for closer in reversed(self._closers):
            self.run(closer())
        self._thread.close()

    async def _start(self) -> None:
        self.controller = FakeController()
        self.gateway = await self._start_model(
            self.config, self._tokenizer, self.engine, self.controller
        )
        self.engines = self.gateway.engines
        for place, (name, tokenizer) in enumerate(self._more_models.items(), 1):
            model = replace(self.config.model, served_model_name=name)
            config = replace(self.config, model=model, fleet=f"model-{place}")
            engine, controller = ScriptedEngine(), FakeController(model=name)
            gateway = await self._start_model(config, tokenizer, engine, controller)
            self.others[name] = FurtherModel(gateway=gateway, engine=engine, controller=controller)
        await self._start_grpc()
        for gateway in self.gateway.shared.models:
            gateway.cluster.start()
        await self._start_http()

    async def _start_model(
        self,
        config: ClusterConfig,
        tokenizer: Tokenizer | None,
        engine: ScriptedEngine,
        controller: FakeController,
    ) -> Gateway:
        await engine.start()
        self._closers.append(engine.stop)

        async def find() -> ControllerCalls:
            return controller

        cluster = SnapshotFollower(find)
        engines = EnginePool(
            CLUSTER_TOKEN,
            "gateway-test",
            RoutingPolicy(config.gateway.routing_policy),
            silence_limit_s=self._silence_limit_s,
            ping_s=0.1,
        )
        shared = self.gateway.shared if hasattr(self, "gateway") else None
        gateway = Gateway(config, tokenizer, cluster, engines, "gateway-test", self._tuning, shared)
        self._closers.append(gateway.close)
        if gateway.tracing is not None:
            tracing = gateway.tracing
            self._closers.append(lambda: asyncio.to_thread(tracing.export.stop))
        self._closers.append(engines.stop)

        async def stop_cluster() -> None:
            cluster.stop()

        self._closers.append(stop_cluster)
        return gateway

    async def _start_grpc(self) -> None:
        server = self.grpc_server = GrpcServer(self.gateway, "127.0.0.1", 0)
        port = await server.start()
        self.grpc_target = f"127.0.0.1:{port}"
        self._closers.append(lambda: server.stop(0))
        self.admin = AdminApi(self.gateway, self.config.gateway)
        await self.admin.start()
        self._closers.append(self.admin.stop)

    async def _start_http(self) -> None:
        self.url, stop = await start_http(build_public_app(self.gateway), self.config.gateway)
        self._closers.append(stop)


async def start_http(
    app: ASGIApp, section: GatewaySection | None = None
) -> tuple[str, Callable[[], Coroutine[Any, Any, None]]]:
    """Serve an application on a free loopback port; its URL, and what ends it."""
    section = section or GatewaySection()
    server = HttpListener(
        app,
        section,
        "HTTP",
        "127.0.0.1",
        0,
        max_connections=4096,
        trusted_proxies=section.forwarded_allow_ips,
    )
    port = await server.start()
    scheme = "https" if section.has_tls else "http"
    return f"{scheme}://127.0.0.1:{port}", server.stop


@contextlib.contextmanager
def running_stack(
    section: GatewaySection | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    engine: EngineSection | None = None,
    has_tokenizer: bool = True,
    serving: bool = True,
    silence_limit_s: float = WAIT_S,
    observability: ObservabilitySection | None = None,
    tuning: GatewayTuning | None = None,
    more_models: Mapping[str, Tokenizer | None] | None = None,
) -> Iterator[Stack]:
    """A gateway that runs for the length of a ``with`` block.

    ``more_models``: tokenizers of the models that it serves beside ``MODEL``, by name.
    """
    if tokenizer is None and has_tokenizer:
        tokenizer = tiny_tokenizer()
    section = section or GatewaySection(request_timeout_s=WAIT_S)
    stack = Stack(section, tokenizer, engine, silence_limit_s, observability, tuning, more_models)
    stack.start(serving)
    try:
        yield stack
    finally:
        stack.stop()


def post(stack: Stack, path: str, **fields: Any) -> httpx.Response:
    """Send a JSON body."""
    return stack.http.post(path, json=fields)


def complete(stack: Stack, **fields: Any) -> dict[str, Any]:
    """The answer of a completion that must succeed."""
    response = post(stack, "/v1/completions", **fields)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer
