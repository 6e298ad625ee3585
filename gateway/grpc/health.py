"""``grpc.health.v1.Health`` of one port, without keys.

Each ``Watch`` sends its own messages, so that a client that does not read delays neither other
clients nor changes of the status. The servicer of grpcio-health-checking is not used: it writes
while it holds the lock of the status, and stores every service name that clients send.

Source: https://github.com/grpc/grpc/blob/master/doc/health-checking.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2 as pb

from cluster.core.errors import ExpertMeshError, RequestError, UnknownNameError
from gateway.core.errors import report_error
from gateway.grpc.call_limits import (
    BoundedStream,
    CallPool,
    Context,
    Handler,
    UnreadCalls,
    freed_when_aborted,
)

HEALTH_SERVICE = pb.DESCRIPTOR.services_by_name["Health"].full_name
MAX_REQUEST_BYTES = 1024
"""Maximum size of a request. Service names are much shorter."""
MAX_READS = 16
"""Maximum calls that wait for their message (up to 16 MiB each); a further one ends the oldest."""
MAX_WATCHES = 256
"""Maximum number of concurrent ``Watch`` streams; a further stream ends the oldest."""
READ_LIMIT_S = 10.0
WRITE_LIMIT_S = 10.0
WATCH_LIMIT_S = 600.0
"""Longest duration of a ``Watch`` stream in seconds. Clients then begin another one."""


class HealthService:
    """Reports the status of a port's services.

    Args:
        services: full names of the services. The server's empty name is added.
        unread: counts the port's ended calls with unread messages.
    """

    def __init__(
        self,
        services: Iterable[str],
        unread: UnreadCalls,
    ) -> None:
        self._services = frozenset(("", *services))
        self._unread = unread
        self._write_limit_s = WRITE_LIMIT_S
        self._status: int = pb.HealthCheckResponse.NOT_SERVING
        self._changed = asyncio.Event()
        self._has_ended = False
        self.reads = CallPool(MAX_READS)
        self.watches = CallPool(MAX_WATCHES)

    def set(self, is_serving: bool) -> None:
        """Change the status of all services."""
        if not self._has_ended:
            kind = pb.HealthCheckResponse
            self._status = kind.SERVING if is_serving else kind.NOT_SERVING
            self._changed.set()
            self._changed = asyncio.Event()

    def end(self) -> None:
        """Set the status of all services to NOT_SERVING permanently."""
        self.set(False)
        self._has_ended = True

    def handler(self) -> grpc.GenericRpcHandler[Any, Any]:
        """Make the handler to add to a server."""
        make: Any = (
            grpc.stream_stream_rpc_method_handler
        )  # reads the message itself, within a time limit
        methods = {"Check": self._check, "Watch": self._watch}
        handlers = {name: make(self._served(method)) for name, method in methods.items()}
        return grpc.method_handlers_generic_handler(HEALTH_SERVICE, handlers)

    def _served(self, method: Callable[[str, BoundedStream], Awaitable[None]]) -> Handler:
        @freed_when_aborted
        async def serve(_: Any, context: Context) -> None:
            stream = BoundedStream(context, READ_LIMIT_S, self._write_limit_s, self._unread)
            try:
                self._unread.check(context.peer())
                async with self.reads.entered(context.peer()):
                    service = _service_of(await stream.read())
                await method(service, stream)
            except ExpertMeshError as err:
                await stream.abort(err, report_error(err), ())

        return serve

    async def _check(self, service: str, stream: BoundedStream) -> None:
        if service not in self._services:
            raise UnknownNameError("the service is not known")
        await stream.context.send_initial_metadata(())
        await stream.write(_encode_status(self._status))

    async def _watch(self, service: str, stream: BoundedStream) -> None:
        is_known, sent = service in self._services, -1
        async with self.watches.entered(stream.context.peer(), WATCH_LIMIT_S):
            await stream.context.send_initial_metadata(())
            while True:
                changed, status = self._changed, self._status
                if not is_known:
                    status = pb.HealthCheckResponse.SERVICE_UNKNOWN
                if status != sent:
                    await stream.write(_encode_status(status))
                    sent = status
                await changed.wait()


def _service_of(request: bytes | None) -> str:
    """Read the service name of a request. Raises ``RequestError``."""
    if request is None:
        raise RequestError("the call has no message")
    if len(request) > MAX_REQUEST_BYTES:
        raise RequestError(
            f"the request ({len(request)} bytes) must be at most {MAX_REQUEST_BYTES} bytes",
            "service",
        )
    try:
        return str(pb.HealthCheckRequest.FromString(request).service)
    except DecodeError as err:
        raise RequestError("the message cannot be decoded as a HealthCheckRequest") from err


def _encode_status(status: int) -> bytes:
    return bytes(pb.HealthCheckResponse(status=status).SerializeToString())
