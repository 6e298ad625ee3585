"""Handlers of gRPC calls. They check the key, then run the method within a ``GrpcCall``."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Collection
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from grpc_reflection.v1alpha import reflection_pb2

from cluster.core.errors import ExpertMeshError, RequestError
from gateway.auth.auth import KeyRing
from gateway.calls.gateway import Gateway
from gateway.core.errors import RouteError
from gateway.grpc.call import GrpcCall, text_metadata
from gateway.grpc.call_limits import CallLimits, Context, freed_when_aborted
from gateway.grpc.health import HEALTH_SERVICE
from gateway.grpc.messages import read_message

if TYPE_CHECKING:
    _Interceptor = grpc.aio.ServerInterceptor[Any, Any]
else:  # generic in the stubs only
    _Interceptor = grpc.aio.ServerInterceptor

Continuation = Callable[[grpc.HandlerCallDetails], Awaitable[Any]]

Procedure = Callable[[Any, GrpcCall], Any]
"""Implementation of a gRPC method: returns an awaitable response, or an async generator."""
REFLECTION_SERVICE = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].full_name
REFLECTION_LIMIT_S = 60.0
"""Longest duration of a reflection stream in seconds."""
_UNKNOWN = "other"
"""Metric label of unknown methods, so that clients cannot create labels."""
_MAX_PATH_CHARS = 128
"""Maximum number of characters of a client's path in an error."""


class KeyInterceptor(_Interceptor):
    """Requires a key of the port for all calls except health checks.

    For an unknown method, a client with a key gets the error that this gateway defines, not gRPC's.
    Reflection, which a library implements, gets the same limits as the methods.
    """

    def __init__(self, gateway: Gateway, keys: KeyRing, limits: CallLimits) -> None:
        self._gateway = gateway
        self._keys = keys
        self._limits = limits

    async def intercept_service(
        self, continuation: Continuation, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Return the handler of a call, or a handler that raises UNAUTHENTICATED or
        UNIMPLEMENTED."""
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
                raise RouteError(
                    f"there is no procedure {path[:_MAX_PATH_CHARS]!r} on this port", 404
                )
        except ExpertMeshError as err:
            return self._refusal(names, err)
        return self._bounded(names, handler) if service == REFLECTION_SERVICE else handler

    def _bounded(
        self, names: tuple[str, str], handler: grpc.RpcMethodHandler[Any, Any]
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Wrap a library's handler of streams in the limits of the port."""
        answers_of: Any = handler.stream_stream

        @freed_when_aborted
        async def serve(requests: Any, context: Context) -> None:
            call = GrpcCall(
                self._gateway, *names, context, self._keys, self._limits, REFLECTION_LIMIT_S
            )
            async with call.served(), aclosing(answers_of(requests, context)) as answers:
                async for answer in answers:
                    await call.write(answer)

        make: Any = grpc.stream_stream_rpc_method_handler
        bounded: grpc.RpcMethodHandler[Any, Any] = make(
            serve, handler.request_deserializer, handler.response_serializer
        )
        return bounded

    def _refusal(
        self, names: tuple[str, str], error: ExpertMeshError
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Make a handler that refuses a call without reading a message.

        It counts the call and ends it with ``error``, or with the error of the caller's key.
        """

        @freed_when_aborted
        async def refuse(_: Any, context: Context) -> None:
            async with GrpcCall(self._gateway, *names, context, self._keys, self._limits).served():
                raise error

        make: Any = grpc.stream_stream_rpc_method_handler
        handler: grpc.RpcMethodHandler[Any, Any] = make(refuse)
        return handler


async def _request(gateway: Gateway, method: MethodDescriptor, data: bytes | None) -> Message:
    """Decode the request message of a method. Raises ``RequestError``."""
    if data is not None:
        with suppress(DecodeError):
            return await gateway.long_work.run(len(data), read_message, method.input_type, data)
    # gRPC would return UNKNOWN if a deserializer failed
    raise RequestError("the message cannot be decoded as the procedure's request")


def service_handlers(
    gateway: Gateway,
    service: ServiceDescriptor,
    find: Callable[[str], Procedure],
    keys: KeyRing,
    limits: CallLimits,
    endless: Collection[str] = (),
) -> grpc.GenericRpcHandler[Any, Any]:
    """Make the handlers of all methods of a service.

    Args:
        gateway: counts the calls.
        service: descriptor of the service.
        find: returns the implementation of a method by name.
        keys: API keys of the port.
        limits: limits of the port.
        endless: names of methods with endless streams, which only the client ends.
    """

    def handler(method: MethodDescriptor) -> grpc.RpcMethodHandler[Any, Any]:
        procedure = find(method.name)
        names, stream_s = (service.full_name, method.name), None
        if method.name in endless:
            stream_s = math.inf

        async def answer(call: GrpcCall) -> None:
            request = await _request(gateway, method, await call.read())
            call.set_id(await call.convert(getattr, request, "request_id", ""))
            if not method.server_streaming:
                await call.send_id()
                found: Message = await procedure(request, call)
                size = call.response_size
                await call.write(await gateway.long_work.run(size, found.SerializeToString))
                return
            async with aclosing(procedure(request, call)) as answers:
                async for piece in answers:
                    await call.write(piece.SerializeToString())

        @freed_when_aborted
        async def serve(_: Any, context: Context) -> None:
            call = GrpcCall(gateway, *names, context, keys, limits, stream_s)
            async with call.served():
                await answer(call)  # gRPC may keep this frame; it contains no message

        make: Any = grpc.stream_stream_rpc_method_handler  # reads and writes have time limits
        made: grpc.RpcMethodHandler[Any, Any] = make(serve)
        return made

    handlers = {method.name: handler(method) for method in service.methods}
    return grpc.method_handlers_generic_handler(service.full_name, handlers)
