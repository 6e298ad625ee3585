"""A listener on one port that serves an ASGI application over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator, Sequence

import uvicorn
from starlette.types import ASGIApp

from cluster.config.gateway import GatewaySection
from cluster.core.errors import StartError
from gateway.auth.tls import uvicorn_options
from gateway.listener.listening_socket import HANDSHAKE_S, listen, refuse_new_connections
from gateway.listener.timed_protocol import HEAD_LIMIT_S, TimedHttpProtocol

_START_LIMIT_S = 10.0
_MAX_ACCEPTS = 16
"""Maximum number of connections that asyncio accepts in one iteration of the event loop, so that
open streams continue while thousands of clients connect. uvloop accepts one."""


class HttpListener:
    """Accepts HTTP connections on a port.

    Args:
        app: the application.
        section: configuration with the TLS options of the port.
        name: name of the port in errors.
        host: interface to listen on.
        port: port number; 0 selects a free port.
        max_connections: maximum number of open connections.
        is_shared: whether several replicas of this host listen on the port.
        trusted_proxies: addresses and networks whose ``X-Forwarded`` headers are trusted.
    """

    def __init__(
        self,
        app: ASGIApp,
        section: GatewaySection,
        name: str,
        host: str,
        port: int,
        *,
        max_connections: int,
        is_shared: bool = False,
        trusted_proxies: Sequence[str] = (),
    ) -> None:
        self._name, self._host, self._port = name, host, port
        self._is_shared = is_shared
        self.max_connections = max_connections
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=1,
            http=TimedHttpProtocol,
            proxy_headers=bool(trusted_proxies),
            forwarded_allow_ips=list(trusted_proxies),
            **uvicorn_options(section),
        )
        self._server = _Uvicorn(config, self._make_protocol)
        self._idle: dict[TimedHttpProtocol, None] = {}
        self._listener: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def is_serving(self) -> bool:
        """Whether the listener has started and has neither stopped nor failed."""
        return self._task is not None and not self._task.done()

    @property
    def connections(self) -> list[TimedHttpProtocol]:
        """Open connections."""
        found = list(self._server.server_state.connections)
        return [one for one in found if isinstance(one, TimedHttpProtocol)]

    def _make_protocol(self) -> TimedHttpProtocol:
        server = self._server
        protocol = TimedHttpProtocol(server.config, server.server_state, {})
        protocol.max_connections, protocol.idle = self.max_connections, self._idle
        return protocol

    async def start(self) -> int:
        """Bind the port and serve; return the port. Raises ``StartError``."""
        try:
            self._server.config.load()  # reads the TLS files, which may have changed
        except (OSError, ValueError) as err:
            raise StartError(self._name, f"cannot use the TLS files: {err}") from err
        try:
            self._listener = listen(self._host, self._port, is_shared=self._is_shared)
        except OSError as err:
            address = f"{self._host}:{self._port}"
            raise StartError(self._name, f"cannot bind {address}: {err}") from err
        bound = int(self._listener.getsockname()[1])
        self._task = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        async with asyncio.timeout(_START_LIMIT_S):
            while not self._server.started and not self._task.done():
                await asyncio.sleep(0.01)
        return bound

    async def stop_accepting(self) -> None:
        """Leave new connections to the other listeners of the port. Open connections continue.

        If the port has no other listener, new connections are refused.
        """
        if self._listener is None:
            return
        listener, self._listener = self._listener, None
        if self._is_shared:
            refuse_new_connections(listener)
            await asyncio.sleep(HANDSHAKE_S)
        self._server.stop_listening()

    async def stop(self) -> None:
        """Stop serving. Running requests have one second to end."""
        await self.stop_accepting()
        if self._task is not None:
            self._server.should_exit = True
            await self._task


class _Uvicorn(uvicorn.Server):
    """uvicorn's server with limited TLS handshakes, and without signal handlers of its own."""

    def __init__(
        self, config: uvicorn.Config, make_protocol: Callable[[], asyncio.Protocol]
    ) -> None:
        super().__init__(config)
        self._make_protocol = make_protocol
        self.servers = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the server as uvicorn does, on sockets that already listen."""
        await self.lifespan.startup()
        config, loop = self.config, asyncio.get_running_loop()
        limit_s = HEAD_LIMIT_S if config.ssl is not None else None
        self.servers = [
            await loop.create_server(
                self._make_protocol,
                sock=listener,
                ssl=config.ssl,
                backlog=_MAX_ACCEPTS,  # of asyncio, which also sets the socket's
                ssl_handshake_timeout=limit_s,
            )
            for listener in sockets or ()
        ]
        for listener in sockets or ():
            listener.listen(config.backlog)
        self.started = True

    def stop_listening(self) -> None:
        """Close the listening sockets, but not the connections."""
        for server in self.servers:
            server.close()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
