"""What every gRPC call passes: the check of its key, then the procedure within a ``GrpcCall``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message

from cluster.core.errors import ExpertMeshError, RequestError
from gateway.auth.auth import KeyRing
from gateway.core.errors import RouteError
from gateway.generation.gateway import Gateway
from gateway.grpc.call import Context, GrpcCall, text_metadata
from gateway.grpc.messages import read_message

if TYPE_CHECKING:
    _Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:  # generic in the stubs only
    _Interceptor = grpc.aio.ServerInterceptor

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]

Procedure = Callable[[Any, GrpcCall], Any]
"""A request message to its answer, awaited; or to an asynchronous generator of answers, which
calls ``GrpcCall.send_id`` before the first."""
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
            return self._refusal(names, err)
        return handler

    def _refusal(
        self, names: tuple[str, str], error: ExpertMeshError
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Handler of any kind of procedure that waits for no message.

        It names and counts a call, and ends it with the error, or with that of its key.
        """

        async def refuse(requests: Any, context: Context) -> AsyncIterator[Any]:
            async with GrpcCall(self._gateway, *names, context, "", self._keys).served():
                raise error
            yield

        make: Any = grpc.stream_stream_rpc_method_handler
        handler: grpc.RpcMethodHandler[Any, Any] = make(refuse)
        return handler


def service_handlers(
    gateway: Gateway,
    service: ServiceDescriptor,
    find: Callable[[str], Procedure],
    keys: KeyRing,
) -> grpc.GenericRpcHandler[Any, Any]:
    """Handlers of all procedures that a service describes.

    Args:
        gateway: counts the calls.
        service: the description.
        find: the procedure of a name.
        keys: the keys of the port.
    """

    @asynccontextmanager
    async def entered(
        method: MethodDescriptor, data: bytes, context: Context
    ) -> AsyncIterator[tuple[Message, GrpcCall]]:
        """The message and its call; an error within ends the call."""
        request: Message | None = None
        wrong: Exception | None = None
        try:
            request = await gateway.long_work.run(len(data), read_message, method.input_type, data)
        except (RequestError, DecodeError) as err:
            wrong = err
        wanted_id = str(getattr(request, "request_id", ""))
        names = service.full_name, method.name
        call = GrpcCall(gateway, *names, context, wanted_id, keys, size=len(data))
        async with call.served():
            if isinstance(wrong, RequestError):
                raise wrong
            if request is None:  # gRPC would say UNKNOWN where a deserializer fails
                raise RequestError("the message cannot be decoded as the procedure's request")
            yield request, call

    def unary(method: MethodDescriptor) -> Any:
        procedure = find(method.name)

        async def serve(data: bytes, context: Context) -> bytes:
            async with entered(method, data, context) as (request, call):
                await call.send_id()
                answer: Message = await procedure(request, call)
                size = call.answer_size
                return await gateway.long_work.run(size, answer.SerializeToString)

        return serve

    def streaming(method: MethodDescriptor) -> Any:
        procedure = find(method.name)

        async def serve(data: bytes, context: Context) -> AsyncIterator[bytes]:
            async with (
                entered(method, data, context) as (request, call),
                aclosing(procedure(request, call)) as answers,
            ):
                async for answer in answers:
                    yield answer.SerializeToString()

        return serve

    def handler(method: MethodDescriptor) -> grpc.RpcMethodHandler[Any, Any]:
        make: Any = grpc.unary_unary_rpc_method_handler
        if method.server_streaming:
            make = grpc.unary_stream_rpc_method_handler
        serve = (streaming if method.server_streaming else unary)(method)
        made: grpc.RpcMethodHandler[Any, Any] = make(serve)
        return made

    handlers = {method.name: handler(method) for method in service.methods}
    return grpc.method_handlers_generic_handler(service.full_name, handlers)
