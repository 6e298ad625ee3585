"""The admin servers of a replica: HTTP and gRPC, each on its own port."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.config.gateway import GatewaySection, reachable_host
from cluster.core.errors import StartError
from gateway.admin.grpc import AdminGrpcServer
from gateway.admin.http import admin_http_server
from gateway.calls.gateway import Gateway
from gateway.listener.http_listener import HttpListener

HTTP_PORT = 8001
GRPC_PORT = 50052

_Server = HttpListener | AdminGrpcServer


@dataclass(eq=False)
class AdminApi:
    """Starts and stops both admin servers."""

    gateway: Gateway
    """The replica."""
    section: GatewaySection
    """Interface and ports. All replicas of a host share a configured port. Without a configured
    port, a server uses the default port if it is free, else any free port."""
    http_port: int = field(default=HTTP_PORT, kw_only=True)
    """Default HTTP port."""
    grpc_port: int = field(default=GRPC_PORT, kw_only=True)
    """Default gRPC port."""
    http: str = field(default="", init=False)
    """``host:port`` of the HTTP server while it runs."""
    grpc: str = field(default="", init=False)
    """``host:port`` of the gRPC server while it runs."""
    _servers: list[_Server] = field(default_factory=list, init=False)

    async def start(self) -> None:
        """Bind both ports and serve. Raises ``StartError``."""
        section = self.section
        host = reachable_host(section.admin_host)
        http = await self._open(admin_http_server, section.admin_port, self.http_port)
        grpc = await self._open(AdminGrpcServer, section.admin_grpc_port, self.grpc_port)
        self.http, self.grpc = f"{host}:{http}", f"{host}:{grpc}"

    async def stop(self) -> None:
        for server in self._servers:
            await server.stop()

    async def _open(self, kind: Callable[..., _Server], wanted: int | None, usual: int) -> int:
        is_shared = bool(wanted) and self.section.num_gateway_replicas > 1
        try:
            return await self._start(kind, usual if wanted is None else wanted, is_shared)
        except StartError:
            if wanted is not None:
                raise
            return await self._start(kind, 0, is_shared)

    async def _start(self, kind: Callable[..., _Server], port: int, is_shared: bool) -> int:
        server = kind(self.gateway, self.section.admin_host, port, shared=is_shared)
        bound = await server.start()
        self._servers.append(server)
        return bound
