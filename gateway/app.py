"""The gateway as a Ray Serve deployment. Serve starts, checks and replaces its replicas.

A replica runs its own HTTP and gRPC servers, which share one ``Gateway``. It binds their ports at
its start and is ready when the cluster is. With ``--serve-proxy``, Ray Serve's HTTP proxy serves
the same application.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve

from cluster.config.cluster import ClusterConfig
from cluster.config.gateway import ShutdownStage
from cluster.tracing import logs
from gateway.admin.service import AdminApi
from gateway.batches.runner import BatchRunner
from gateway.calls.gateway import Gateway
from gateway.calls.served_models import SharedParts
from gateway.cluster.client import RayServeReplicas, find_models_actor, read_table
from gateway.cluster.serve_replicas import ReplicaCall
from gateway.cluster.table_follower import TableFollower
from gateway.core.tuning import GatewayTuning
from gateway.dashboard.sampler import Sampler
from gateway.grpc.server import GrpcServer
from gateway.http.api import HttpApi
from gateway.http.serve_paths import APP_NAME as APP_NAME
from gateway.listener.connection_limits import raise_file_limit
from gateway.listener.http_listener import HttpListener
from gateway.model_set import ModelSet
from gateway.offload.malloc_trim import start_trimming
from gateway.offload.young_garbage import collect_often
from gateway.protocols import build_public_app
from gateway.state.store import open_in_time, open_store
from gateway.state.sweeper import StateSweeper

logger = logging.getLogger(__name__)

DEPLOYMENT_NAME = "gateway"
_HEAD_NODE = "node:__internal_head__"
"""Ray's resource of the head node. Gateways run there if no node is labelled for them, as ``host``
is an address of that node."""
_SPARE_REQUESTS = 1024
"""Requests that Serve accepts beyond ``max_queue``, for probes, scrapes and requests to refuse."""
_LEAVING_POLL_S = 0.1
_SWITCH_INTERVAL_S = 0.0005
"""Longest time in seconds that a thread holds Python's GIL while the event loop waits for it. The
loop releases the GIL at each system call, a dozen times per small request."""
_HEALTH_CHECK_PERIOD_S = 1.0
"""Interval in seconds of Serve's health checks, its only way to detect a dead replica."""


@serve.deployment(
    name=DEPLOYMENT_NAME,
    ray_actor_options={"num_cpus": 0, "resources": {_HEAD_NODE: 0.001}},
    max_constructor_retry_count=2,
    health_check_period_s=_HEALTH_CHECK_PERIOD_S,
    graceful_shutdown_wait_loop_s=0.1,
    graceful_shutdown_timeout_s=2.0,
)
@serve.ingress()
class GatewayReplica:
    """One replica of the gateway; Serve builds it from the configurations of the models."""

    async def __init__(self, configs: Sequence[dict[str, Any]]) -> None:  # type: ignore[misc]  # Serve awaits it
        settings = ClusterConfig.from_dict(configs[0])
        name = f"gateway-{serve.get_replica_context().replica_id.unique_id}"
        logs.set_up(name, settings.observability.log_format)
        logs.format_library_logs("ray.serve")
        node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        section, tuning = settings.gateway, GatewayTuning()
        shared = SharedParts.of(section, tuning, open_store(section, opens=False))
        self._models = ModelSet(name, node, tuning, shared)
        await self._models.add_first(configs, await read_table())
        self._gateway = next(iter(shared.models))
        await open_in_time(shared.state, shared.disk)
        replicas = self._gateway.status.replicas
        if section.num_gateway_replicas > 1:
            replicas = RayServeReplicas(self._gateway.status.answers)
        connections = raise_file_limit()
        self._grpc = GrpcServer(
            self._gateway, section.host, section.grpc_port, max_connections=connections.grpc
        )
        grpc_port = await self._grpc.start()
        self._http = HttpListener(
            build_public_app(self._gateway),
            section,
            "HTTP",
            section.host,
            section.port,
            max_connections=connections.http,
            is_shared=True,  # the host's replicas share the port
            trusted_proxies=section.forwarded_allow_ips,
        )
        http_port = await self._http.start()
        self._admin = AdminApi(self._gateway, section)
        await self._admin.start()
        host = node if section.host in ("0.0.0.0", "::") else section.host
        addresses = {
            "pid": os.getpid(),
            "http": f"{host}:{http_port}",
            "grpc": f"{host}:{grpc_port}",
            "admin_http": self._admin.http,
            "admin_grpc": self._admin.grpc,
        }

        def complete(gateway: Gateway) -> None:
            gateway.status.addresses, gateway.status.replicas = addresses, replicas

        self._models.on_start = complete
        self._models.start()
        table = TableFollower(find_models_actor, name, self._models.num_calls, self._models.apply)
        shared.models.table = self._table = table
        table.start()
        self._sweeper = StateSweeper(self._gateway.state, self._gateway.tuning.state_sweep_s)
        self._sweeper.start()
        self._sampler = Sampler(self._gateway)
        self._sampler.start()
        self._batches = BatchRunner(self._gateway, HttpApi(self._gateway).routes())
        self._batches.start()
        tune_process()
        self._is_ending = False
        self._leaving = asyncio.create_task(self._share_port_until_leaving())
        logger.info("%s serves HTTP on port %d, gRPC on port %d", name, http_port, grpc_port)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Build the application of Serve's proxy. Called by Serve after the constructor."""
        return build_public_app(self._gateway, is_behind_serve=True)

    async def check_health(self) -> None:
        """Raise ``RuntimeError`` if the HTTP server has ended. Serve then replaces the replica."""
        if not self._http.is_serving:
            raise RuntimeError("the HTTP server has ended")

    async def _share_port_until_leaving(self) -> None:
        """Wait until this replica alone is drained; then leave new connections to the others."""
        while not self._gateway.readiness.has_left(time.monotonic()):
            await asyncio.sleep(_LEAVING_POLL_S)
        if not self._is_ending and self._gateway.limits.num_gateway_replicas > 1:
            await self._http.stop_accepting()

    async def not_ready_reasons(self) -> list[str]:
        """Return why ``/ready`` would fail, for callers that have no TLS client certificate."""
        return self._gateway.shared.models.not_ready_reasons()

    async def addresses(self) -> dict[str, Any]:
        """Return the addresses of this replica by port name."""
        return self._gateway.status.addresses

    async def end(self, stage: ShutdownStage) -> int:
        """Carry out one stage of the server's shutdown; return the number of running requests."""
        self._is_ending = True
        left = self._gateway.shut_down(stage, time.monotonic())
        if stage == "fail" and not left:
            await self._stop_tracing()  # Ray may end before Serve has ended this replica
        return left

    async def answer_replica(self, question: ReplicaCall, *details: Any) -> tuple[str, Any]:
        """Answer a query that a replica sends to all replicas."""
        return self._gateway.status.answers.handle(question, *details)

    async def __del__(self) -> None:
        """Stop the replica. Called by Serve."""
        if not hasattr(self, "_grpc"):
            return  # the constructor failed
        if hasattr(self, "_sweeper"):
            await self._sweeper.stop()
        if hasattr(self, "_sampler"):
            await self._sampler.stop()
        if hasattr(self, "_batches"):
            await self._batches.stop()
        if hasattr(self, "_leaving"):
            self._leaving.cancel()
        self._gateway.leave(time.monotonic())  # responses then close their connections
        self._gateway.shared.models.end_waits()
        if hasattr(self, "_table"):
            self._table.stop()
        await asyncio.gather(*(one.cluster.leave() for one in self._gateway.shared.models))
        servers = (getattr(self, name, None) for name in ("_http", "_grpc", "_admin"))
        await asyncio.gather(*(server.stop() for server in servers if server is not None))
        await self._models.close()
        await self._stop_tracing()

    async def _stop_tracing(self) -> None:
        if self._gateway.tracing is not None:
            await asyncio.to_thread(self._gateway.tracing.export.stop)


def tune_process() -> None:
    """Set the garbage collector, the memory allocator and the GIL for many open streams."""
    start_trimming()
    collect_often()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def build_app(
    config: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    selector: Mapping[str, str] | None = None,
    num_nodes: int = 0,
) -> serve.Application:
    """Build the Serve application of a configuration (``ClusterConfig.to_dict``).

    ``config`` may also be a sequence of the configurations of several models, the default first.

    With ``selector``, replicas run evenly spread on the ``num_nodes`` nodes with these labels; by
    default they run on the head node.

    Run it with ``serve.run(build_app(config), name=APP_NAME, route_prefix="/")``, or with
    ``route_prefix=None`` if Serve's proxy serves only other applications.
    """
    configs = [config] if isinstance(config, Mapping) else list(config)
    section = ClusterConfig.from_dict(configs[0]).gateway
    deployment: Any = GatewayReplica  # the decorators make it a serve.Deployment
    place: dict[str, Any] = {}
    if selector:
        actor = {"num_cpus": 0, "label_selector": dict(selector)}
        each = -(-section.num_gateway_replicas // num_nodes)
        place = {"ray_actor_options": actor, "max_replicas_per_node": each}
    application: serve.Application = deployment.options(
        num_replicas=section.num_gateway_replicas,
        max_ongoing_requests=section.max_queue + _SPARE_REQUESTS,
        **place,
    ).bind(configs)
    return application
