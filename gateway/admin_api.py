"""The admin service of a replica: one service, two codecs, each on a port of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cluster.errors import StartError
from cluster.gateway_config import GatewaySection, reachable_host
from gateway.core import Gateway
from gateway.grpc_admin import AdminGrpcServer
from gateway.http_admin import AdminHttpServer

HTTP_PORT = 8001
"""HTTP port where none was asked for."""
GRPC_PORT = 50052
"""gRPC port where none was asked for."""


class _Server(Protocol):
    async def start(self) -> int:
        """Bind and serve; the port."""

    async def stop(self) -> None:
        """End it."""


class AdminApi:
    """Both servers.

    Args:
        gateway: what is behind them.
        section: interface and ports: whoever is let in there may end the cluster. A port that was
            asked for is shared by all replicas of the host; where none was, the usual one is taken
            if it is free, and else any.
    """

    def __init__(self, gateway: Gateway, section: GatewaySection) -> None:
        self._gateway = gateway
        self._section = section
        self._servers: list[_Server] = []
        self.http = ""
        """``host:port`` of the HTTP server, once it runs."""
        self.grpc = ""
        """``host:port`` of the gRPC server, once it runs."""

    async def start(self) -> None:
        """Bind both ports and serve. Raises ``StartError``."""
        section, gateway = self._section, self._gateway
        shared = section.num_gateway_replicas > 1

        def http(port: int, is_wanted: bool) -> _Server:
            return AdminHttpServer(gateway, section.admin_host, port, shared=shared and is_wanted)

        def grpc(port: int, is_wanted: bool) -> _Server:
            return AdminGrpcServer(gateway, section.admin_host, port, shared=shared and is_wanted)

        host = reachable_host(section.admin_host)
        self.http = f"{host}:{await self._open(http, section.admin_port, HTTP_PORT)}"
        self.grpc = f"{host}:{await self._open(grpc, section.admin_grpc_port, GRPC_PORT)}"

    async def stop(self) -> None:
        """End both."""
        for server in self._servers:
            await server.stop()

    async def _open(
        self, make: Callable[[int, bool], _Server], wanted: int | None, usual: int
    ) -> int:
        if wanted is None:
            try:
                return await self._start(make(usual, False))
            except StartError:
                return await self._start(make(0, False))
        return await self._start(make(wanted, wanted != 0))

    async def _start(self, server: _Server) -> int:
        port = await server.start()
        self._servers.append(server)
        return port
