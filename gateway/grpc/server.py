"""gRPC servers of a replica. Each has one service with limits, keys, health and reflection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from cluster.core.errors import StartError
from cluster.core.grpc_poller import keep_grpc_poller
from gateway.auth.auth import KeyRing
from gateway.auth.tls import bind
from gateway.calls.gateway import Gateway
from gateway.grpc.api import SERVICE, InferenceProcedures
from gateway.grpc.call_limits import CallLimits
from gateway.grpc.handlers import KeyInterceptor, Procedure, service_handlers
from gateway.grpc.health import HEALTH_SERVICE, HealthService

_READY_POLL_S = 0.1
_SPARE_CALLS = 64
"""Number of calls to accept above ``max_queue``. Admission refuses them with a retry time."""
HANDSHAKE_LIMIT_S = 10
"""Seconds in which a new connection must send its settings and acknowledge the server's."""
IDLE_LIMIT_S = 75
"""Longest time in seconds of a connection without a call, even while headers of a call arrive."""
MAX_CONNECTIONS = 4096
"""Default maximum number of connections of one port; gRPC closes further ones."""
_MAX_STREAMS = 1024
"""Maximum number of concurrent calls of one connection; clients keep further ones back."""
_MIN_PENDING, _PENDING_SPARE = 1000, 2000
"""gRPC's defaults: number of calls that may wait until they are accepted, and number of further
calls. It cancels some of these at random."""
_METADATA_BYTES = 16 * 1024
"""Maximum size of a call's metadata: names, values, 32 bytes per entry, including gRPC's own."""

_AGE_GRACE_S = 60.0
"""Seconds that a connection may stay open past its maximum age, beyond the longest call."""
_MAX_OPTION = 2**31 - 1
"""Maximum value of a gRPC option; as a time in milliseconds 24 days."""


def age_options(longest_call_s: float, connection_age_s: float) -> list[tuple[str, int]]:
    """Return server options that limit the age of connections."""
    grace_ms = min(1000 * (longest_call_s + _AGE_GRACE_S), _MAX_OPTION)
    return [
        ("grpc.max_connection_age_ms", round(1000 * connection_age_s)),
        ("grpc.max_connection_age_grace_ms", round(grace_ms)),
    ]


def server_options(
    so_reuseport: bool = True,
    max_connections: int = MAX_CONNECTIONS,
    max_pending: int = _MIN_PENDING,
) -> list[tuple[str, int]]:
    """Return server options for limits and keepalive. ``max_pending``: calls that may wait until
    they are accepted.

    A silent connection is closed after an unanswered keepalive ping. A connection that sends bytes
    but no complete call is closed after ``IDLE_LIMIT_S``.
    """
    return [
        ("grpc.max_receive_message_length", 16 * 1024 * 1024),
        ("grpc.max_send_message_length", 64 * 1024 * 1024),
        ("grpc.max_metadata_size", _METADATA_BYTES),
        # hard limit; between both limits, gRPC refuses calls at random
        ("grpc.absolute_max_metadata_size", _METADATA_BYTES + 1),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),  # closes the connection; 60 s by default
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.max_concurrent_streams", _MAX_STREAMS),
        ("grpc.server.max_pending_requests", max_pending),
        ("grpc.server.max_pending_requests_hard_limit", max_pending + _PENDING_SPARE),
        ("grpc.server_handshake_timeout_ms", 1000 * HANDSHAKE_LIMIT_S),
        ("grpc.http2.settings_timeout", 1000 * HANDSHAKE_LIMIT_S),
        ("grpc.max_connection_idle_ms", 1000 * IDLE_LIMIT_S),
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.so_reuseport", int(so_reuseport)),
    ]


def add_reflection(server: grpc.aio.Server, service: str, file: Any) -> None:
    """Enable reflection of a service, whose descriptor file is ``file``, and of health."""
    pool = DescriptorPool()
    _add_files(pool, (file, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR), set())
    names = (service, HEALTH_SERVICE, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server, pool)


def _add_files(pool: DescriptorPool, files: Sequence[Any], known: set[str]) -> None:
    """Add descriptor files to a pool, imported files first."""
    for file in files:
        if file.name not in known:
            known.add(file.name)
            _add_files(pool, file.dependencies, known)
            pool.AddSerializedFile(file.serialized_pb)


class ServicePort:
    """One service on its own port, with health and reflection.

    Args:
        gateway: the replica.
        service: descriptor of the service.
        find: returns the implementation of a method by name.
        keys: API keys of the port.
        host: interface to bind.
        port: port to bind; 0 selects a free port.
        options: gRPC server options.
        max_calls: maximum number of concurrent calls, except health checks and endless streams.
        endless: names of methods with endless streams.
    """

    def __init__(
        self,
        gateway: Gateway,
        service: ServiceDescriptor,
        find: Callable[[str], Procedure],
        keys: KeyRing,
        host: str,
        port: int,
        *,
        options: Sequence[tuple[str, int]],
        max_calls: int,
        endless: Collection[str] = (),
    ) -> None:
        self._gateway = gateway
        self._service = service.full_name
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        keep_grpc_poller()
        self.limits = limits = CallLimits.of(gateway.tuning, max_calls)
        self.health = HealthService((service.full_name,), limits.unread)
        self._server = grpc.aio.server(
            interceptors=[KeyInterceptor(gateway, keys, limits)], options=options
        )
        served = service_handlers(gateway, service, find, keys, limits, endless)
        self._server.add_generic_rpc_handlers((served, self.health.handler()))
        add_reflection(self._server, self._service, service.file)
        self.port = 0

    async def start(self, is_ready: bool = True) -> int:
        """Bind the port and serve; return the port. Raises ``StartError``."""
        try:
            self.port = bind(self._server, self._address, self._gateway.limits)
        except RuntimeError as err:
            raise StartError(
                f"gRPC of {self._service}", f"cannot bind {self._address}: {err}"
            ) from err
        self.health.set(is_ready)
        await self._server.start()
        return self.port

    async def stop(self, grace_s: float = 0.5) -> None:
        """Refuse new calls, and end running calls after ``grace_s``."""
        self.health.end()
        await self._server.stop(grace_s)


class GrpcServer(ServicePort):
    """Serves ``Inference``. The health status is the gateway's readiness."""

    def __init__(
        self, gateway: Gateway, host: str, port: int, max_connections: int = MAX_CONNECTIONS
    ) -> None:
        procedures = InferenceProcedures(gateway)
        age_s, max_calls = gateway.tuning.connection_age_s, gateway.limits.max_queue + _SPARE_CALLS
        max_pending = min(max(_MIN_PENDING, max_calls), _MAX_OPTION - _PENDING_SPARE)
        options = server_options(max_connections=max_connections, max_pending=max_pending)
        super().__init__(
            gateway,
            SERVICE,
            lambda name: getattr(procedures, name),
            gateway.keys,
            host,
            port,
            options=[*options, *age_options(gateway.limits.request_timeout_s, age_s)],
            max_calls=max_calls,
        )
        self._watcher: asyncio.Task[None] | None = None

    async def start(self, is_ready: bool = False) -> int:
        port = await super().start(is_ready)
        self._watcher = asyncio.create_task(self._watch_readiness())
        return port

    async def stop(self, grace_s: float = 0.5) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        await super().stop(grace_s)

    async def _watch_readiness(self) -> None:
        was_ready = False
        while not self._gateway.readiness.has_left(time.monotonic()):
            is_ready = not self._gateway.shared.models.not_ready_reasons()
            if is_ready is not was_ready:
                self.health.set(is_ready)
                was_ready = is_ready
            await asyncio.sleep(_READY_POLL_S)
        # GOAWAY makes clients connect to another gateway
        await self._server.stop(self._gateway.limits.request_timeout_s)
