"""Steps of every gRPC call before its handler: the key, and a readable message."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from cluster.core.errors import AuthenticationError, PermissionDeniedError, RequestError
from gateway.auth.auth import KeyRing
from gateway.core.errors import RouteError
from gateway.generation.gateway import Gateway
from gateway.grpc.edge import Context, GrpcEdge, text_metadata

if TYPE_CHECKING:
    _Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:  # generic in the stubs only
    _Interceptor = grpc.aio.ServerInterceptor

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]

HEALTH_SERVICE = "grpc.health.v1.Health"
"""The service without a key."""
_UNKNOWN = "other"
"""Service and method of unknown procedures: names from clients make no metrics."""
_MOST_SHOWN = 128
"""Characters of a client's path in our answer."""


class KeyInterceptor(_Interceptor):
    """Requires a key of the port, for unknown procedures too; not for health checks.

    A client with a key gets our error for an unknown procedure.
    """

    def __init__(self, gateway: Gateway, keys: KeyRing) -> None:
        self._gateway = gateway
        self._keys = keys

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Let a call through, or have it answered with UNAUTHENTICATED or UNIMPLEMENTED."""
        handler = await continuation(handler_call_details)
        path = handler_call_details.method
        if path.startswith(f"/{HEALTH_SERVICE}/"):
            return handler
        given = text_metadata(handler_call_details.invocation_metadata)
        names = (_UNKNOWN, _UNKNOWN) if handler is None else _names(path)
        try:
            self._keys.check(given.get("authorization"), given.get("api-key"))
        except (AuthenticationError, PermissionDeniedError) as err:
            return _Refusal(self._gateway, self._keys, names, err).handler()
        if handler is None:
            absent = RouteError(f"there is no procedure {path[:_MOST_SHOWN]!r} on this port", 404)
            return _Refusal(self._gateway, self._keys, names, absent).handler()
        return handler


class MessageInterceptor(_Interceptor):
    """Lets one service refuse messages that cannot be decoded; gRPC would say UNKNOWN."""

    def __init__(self, service: str) -> None:
        self._prefix = f"/{service}/"

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(self._prefix):
            return handler
        decode = handler.request_deserializer

        def decode_or_stand_in(data: bytes) -> object:
            try:
                return decode(data)
            except DecodeError:
                return UndecodableMessage()

        return handler._replace(request_deserializer=decode_or_stand_in)


class UndecodableMessage:
    """Stands in for a message that cannot be decoded: reading any field of it is a bad request."""

    request_id = ""

    def __getattr__(self, name: str) -> NoReturn:
        raise RequestError("the message cannot be decoded as the procedure's request")


@dataclass(frozen=True, slots=True)
class _Refusal:
    """Ends a call before its handler: names and counts it, and sends the error's status."""

    gateway: Gateway
    keys: KeyRing
    names: tuple[str, str]
    error: Exception

    async def end(self, context: Context) -> NoReturn:
        """End the call with the error, or with that of its key."""
        service, method = self.names
        with GrpcEdge(self.gateway, service, method, context, "", self.keys) as edge:
            try:
                await edge.begin()
                raise self.error
            except Exception as err:
                await edge.abort(err)

    def handler(self) -> grpc.RpcMethodHandler[Any, Any]:
        """For any kind of procedure: it waits for no message."""

        async def refuse(requests: Any, context: Context) -> AsyncIterator[Any]:
            await self.end(context)
            yield

        make: Any = grpc.stream_stream_rpc_method_handler
        handler: grpc.RpcMethodHandler[Any, Any] = make(refuse)
        return handler


def _names(path: str) -> tuple[str, str]:
    """``/package.Service/Method`` -> service, method."""
    service, _, method = path.lstrip("/").rpartition("/")
    return service, method
