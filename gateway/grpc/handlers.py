"""The gRPC handlers of a service: every procedure runs within its ``GrpcCall``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from cluster.core.errors import RequestError
from gateway.auth.auth import KeyRing
from gateway.generation.gateway import Gateway
from gateway.grpc.call import Context, GrpcCall

Procedure = Callable[[Any, GrpcCall], Any]
"""A request message to its answer, awaited; or to an asynchronous generator of answers, which
calls ``GrpcCall.send_id`` before the first."""


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
        with suppress(DecodeError):
            request = GetMessageClass(method.input_type).FromString(data)
        wanted_id = str(getattr(request, "request_id", ""))
        call = GrpcCall(gateway, service.full_name, method.name, context, wanted_id, keys)
        async with call.served():
            if request is None:  # gRPC would say UNKNOWN where a deserializer fails
                raise RequestError("the message cannot be decoded as the procedure's request")
            yield request, call

    def unary(method: MethodDescriptor) -> Any:
        procedure = find(method.name)

        async def serve(data: bytes, context: Context) -> Message:
            async with entered(method, data, context) as (request, call):
                await call.send_id()
                answer: Message = await procedure(request, call)
                return answer

        return serve

    def streaming(method: MethodDescriptor) -> Any:
        procedure = find(method.name)

        async def serve(data: bytes, context: Context) -> AsyncIterator[Message]:
            async with (
                entered(method, data, context) as (request, call),
                aclosing(procedure(request, call)) as answers,
            ):
                async for answer in answers:
                    yield answer

        return serve

    def handler(method: MethodDescriptor) -> grpc.RpcMethodHandler[Any, Any]:
        make: Any = grpc.unary_unary_rpc_method_handler
        if method.server_streaming:
            make = grpc.unary_stream_rpc_method_handler
        serve = (streaming if method.server_streaming else unary)(method)
        encode = GetMessageClass(method.output_type).SerializeToString
        made: grpc.RpcMethodHandler[Any, Any] = make(serve, response_serializer=encode)
        return made

    handlers = {method.name: handler(method) for method in service.methods}
    return grpc.method_handlers_generic_handler(service.full_name, handlers)
