"""The gRPC handlers of a service: every procedure runs within its ``GrpcEdge``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from gateway.auth.auth import KeyRing
from gateway.generation.gateway import Gateway
from gateway.grpc.edge import Context, GrpcEdge

Procedure = Callable[[Any, GrpcEdge], Any]
"""A request message to its answer, awaited; or to an asynchronous generator of answers, which
calls ``GrpcEdge.send_id`` before the first."""


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

    def edge(name: str, request: Any, context: Context) -> GrpcEdge:
        wanted_id = str(getattr(request, "request_id", ""))
        return GrpcEdge(gateway, service.full_name, name, context, wanted_id, keys)

    def unary(name: str) -> Any:
        procedure = find(name)

        async def serve(request: Any, context: Context) -> Message:
            with edge(name, request, context) as call:
                try:
                    await call.begin()
                    answer: Message = await procedure(request, call)
                    return answer
                except Exception as err:
                    await call.abort(err)

        return serve

    def streaming(name: str) -> Any:
        procedure = find(name)

        async def serve(request: Any, context: Context) -> AsyncIterator[Message]:
            with edge(name, request, context) as call:
                try:
                    call.enter()
                    async with aclosing(procedure(request, call)) as answers:
                        async for answer in answers:
                            yield answer
                except Exception as err:
                    await call.abort(err)

        return serve

    def handler(method: MethodDescriptor) -> grpc.RpcMethodHandler[Any, Any]:
        make: Any = grpc.unary_unary_rpc_method_handler
        if method.server_streaming:
            make = grpc.unary_stream_rpc_method_handler
        made: grpc.RpcMethodHandler[Any, Any] = make(
            (streaming if method.server_streaming else unary)(method.name),
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
        return made

    handlers = {method.name: handler(method) for method in service.methods}
    return grpc.method_handlers_generic_handler(service.full_name, handlers)
