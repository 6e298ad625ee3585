"""The gRPC server of a replica: limits, keys, health and reflection around the service."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from cluster.errors import StartError
from gateway.core import Gateway
from gateway.grpc_api import SERVICE, InferenceService
from gateway.grpc_interceptors import HEALTH_SERVICE, KeyInterceptor, MessageInterceptor
from gateway.tls import bind
from protos import inference_pb2
from protos.inference_pb2_grpc import add_InferenceServicer_to_server

logger = logging.getLogger(__name__)

_READY_POLL_S = 0.1
_SPARE_CALLS = 64
"""Calls beyond the queue's limit that still get through, so that probes do and so that it is us who
refuse, with a retry time."""
_METADATA_BYTES = 16 * 1024
"""Of a call, with gRPC's own; as HTTP/2 counts: names, values and 32 bytes an entry."""

CONNECTION_AGE_S = 600.0
"""After so long a connection takes no new calls: clients come again, and spread over the replicas
that there are by then."""
_AGE_GRACE_S = 60.0
"""Beyond the longest call, for those that run on a connection of that age."""


def age_options(longest_call_s: float) -> list[tuple[str, int]]:
    """Options of a server whose connections are renewed and whose calls end by themselves."""
    return [
        ("grpc.max_connection_age_ms", round(1000 * CONNECTION_AGE_S)),
        ("grpc.max_connection_age_grace_ms", round(1000 * (longest_call_s + _AGE_GRACE_S))),
    ]


def server_options(so_reuseport: bool = True) -> list[tuple[str, int]]:
    """Limits and keepalive of the server (see the interface's server options)."""
    return [
        ("grpc.max_receive_message_length", 16 * 1024 * 1024),
        ("grpc.max_send_message_length", 64 * 1024 * 1024),
        ("grpc.max_metadata_size", _METADATA_BYTES),
        # refused from here on; between the two chance would decide
        ("grpc.absolute_max_metadata_size", _METADATA_BYTES + 1),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),  # gRPC closes by this one, after 60 s if not told
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.max_concurrent_streams", 1024),
        ("grpc.so_reuseport", int(so_reuseport)),
    ]


def add_reflection(server: grpc.aio.Server, service: str, file: Any) -> None:
    """Describe a service, the file that it is in, health and reflection: nothing else of ours."""
    pool = DescriptorPool()
    _add_files(pool, (file, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR), set())
    names = (service, HEALTH_SERVICE, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server, pool)


def _add_files(pool: DescriptorPool, files: Sequence[Any], known: set[str]) -> None:
    """Files after those that they import."""
    for file in files:
        if file.name not in known:
            known.add(file.name)
            _add_files(pool, file.dependencies, known)
            pool.AddSerializedFile(file.serialized_pb)


class GrpcServer:
    """Serves ``Inference``, health and reflection.

    Args:
        gateway: what is behind it.
        host: interface.
        port: 0 takes a free one.
    """

    def __init__(self, gateway: Gateway, host: str, port: int) -> None:
        self._gateway = gateway
        self._host = f"[{host}]" if ":" in host else host
        self._wanted_port = port
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server = grpc.aio.server(
            interceptors=[
                KeyInterceptor(gateway, gateway.keys),
                MessageInterceptor(SERVICE),
            ],
            options=[*server_options(), *age_options(gateway.limits.request_timeout_s)],
            maximum_concurrent_rpcs=gateway.limits.max_queue + _SPARE_CALLS,
        )
        self._watcher: asyncio.Task[None] | None = None
        self.port = 0
        """The port that is bound."""

    async def start(self) -> int:
        """Bind and serve, as not ready; returns the port. Raises ``StartError``."""
        add_InferenceServicer_to_server(InferenceService(self._gateway), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        add_reflection(self._server, SERVICE, inference_pb2.DESCRIPTOR)
        address = f"{self._host}:{self._wanted_port}"
        try:
            self.port = bind(self._server, address, self._gateway.limits)
        except RuntimeError as err:
            raise StartError("gRPC", f"cannot bind {address}: {err}") from err
        await self._set_health(False)
        await self._server.start()
        self._watcher = asyncio.create_task(self._watch_readiness())
        return self.port

    async def stop(self, grace_s: float = 0.5) -> None:
        """Refuse new calls, end the others after ``grace_s``."""
        if self._watcher is not None:
            self._watcher.cancel()
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def _watch_readiness(self) -> None:
        was_ready = False
        while not self._gateway.has_left(time.monotonic()):
            is_ready = not self._gateway.not_ready_reasons()
            if is_ready is not was_ready:
                await self._set_health(is_ready)
                was_ready = is_ready
            await asyncio.sleep(_READY_POLL_S)
        # clients hear that the connection takes no more calls, and open another one elsewhere
        await self._server.stop(self._gateway.limits.request_timeout_s)

    async def _set_health(self, is_ready: bool) -> None:
        statuses = health_pb2.HealthCheckResponse
        status = statuses.SERVING if is_ready else statuses.NOT_SERVING
        for service in ("", SERVICE):
            await self._health.set(service, status)
