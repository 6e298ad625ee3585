"""A step of every gRPC call before its handler: the key."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

from cluster.core.errors import ExpertMeshError
from gateway.auth.auth import KeyRing
from gateway.core.errors import RouteError
from gateway.generation.gateway import Gateway
from gateway.grpc.call import Context, GrpcCall, text_metadata

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
        service, _, method = path.lstrip("/").rpartition("/")
        names = (_UNKNOWN, _UNKNOWN) if handler is None else (service, method)
        await self._keys.read_changes()
        try:
            self._keys.check(given.get("authorization"), given.get("api-key"))
            if handler is None:
                raise RouteError(f"there is no procedure {path[:_MOST_SHOWN]!r} on this port", 404)
        except ExpertMeshError as err:
            return _refusal(self._gateway, self._keys, names, err)
        return handler


def _refusal(
    gateway: Gateway, keys: KeyRing, names: tuple[str, str], error: ExpertMeshError
) -> grpc.RpcMethodHandler[Any, Any]:
    """Handler of any kind of procedure that waits for no message.

    It names and counts a call, and ends it with the error, or with that of its key.
    """

    async def refuse(requests: Any, context: Context) -> AsyncIterator[Any]:
        async with GrpcCall(gateway, *names, context, "", keys).served():
            raise error
        yield

    make: Any = grpc.stream_stream_rpc_method_handler
    handler: grpc.RpcMethodHandler[Any, Any] = make(refuse)
    return handler
