"""The admin service over gRPC, on a port of its own. Nothing here but the codec."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from cluster.errors import StartError
from gateway.admin_calls import SERVICE, AdminCalls
from gateway.core import Gateway
from gateway.grpc_edge import Context, GrpcEdge
from gateway.grpc_interceptors import KeyInterceptor, MessageInterceptor
from gateway.grpc_server import add_reflection, server_options
from gateway.tls import bind

logger = logging.getLogger(__name__)

_MAX_CALLS = 256


class AdminGrpcServer:
    """Serves ``Admin``, health and reflection.

    Args:
        gateway: counts calls, and knows the keys.
        host: interface.
        port: 0 takes a free one.
        shared: several replicas of this host listen on the port.
    """

    def __init__(self, gateway: Gateway, host: str, port: int, *, shared: bool = False) -> None:
        self._address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._gateway = gateway
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._server = grpc.aio.server(
            interceptors=[
                KeyInterceptor(gateway, gateway.admin_keys),
                MessageInterceptor(SERVICE.full_name),
            ],
            options=server_options(so_reuseport=shared),
            maximum_concurrent_rpcs=_MAX_CALLS,
        )
        handlers = _Handlers(gateway)
        self._server.add_generic_rpc_handlers((handlers.all(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        add_reflection(self._server, SERVICE.full_name, SERVICE.file)
        self.port = 0
        """The port that is bound."""

    async def start(self) -> int:
        """Bind and serve; returns the port. Raises ``StartError``."""
        try:
            self.port = bind(self._server, self._address, self._gateway.limits)
        except RuntimeError as err:
            raise StartError("admin gRPC", f"cannot bind {self._address}: {err}") from err
        await self._server.start()
        for service in ("", SERVICE.full_name):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return self.port

    async def stop(self, grace_s: float = 0.5) -> None:
        """Refuse new calls, end the others after ``grace_s``."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


class _Handlers:
    """A gRPC handler for every procedure that the service describes."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._calls = AdminCalls(gateway)

    def all(self) -> grpc.GenericRpcHandler[Any, Any]:
        handlers = {method.name: self._handler(method) for method in SERVICE.methods}
        return grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)

    def _handler(self, method: MethodDescriptor) -> grpc.RpcMethodHandler[Any, Any]:
        streams = method.server_streaming
        make: Any = (
            grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        )
        handler: grpc.RpcMethodHandler[Any, Any] = make(
            self._streaming(method.name) if streams else self._unary(method.name),
            request_deserializer=GetMessageClass(method.input_type).FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )
        return handler

    def _unary(self, name: str) -> Any:
        async def serve(request: Message, context: Context) -> Message:
            with self._edge(name, request, context) as edge:
                try:
                    await edge.begin()
                    return await self._calls.unary(name)(request)
                except Exception as err:
                    await edge.abort(err)

        return serve

    def _streaming(self, name: str) -> Any:
        async def serve(request: Message, context: Context) -> AsyncIterator[Message]:
            with self._edge(name, request, context) as edge:
                try:
                    await edge.begin()
                    async with contextlib.aclosing(self._calls.streaming(name)(request)) as items:  # type: ignore[type-var]
                        async for item in items:
                            yield item
                except (asyncio.CancelledError, GeneratorExit):
                    raise
                except Exception as err:
                    await edge.abort(err)

        return serve

    def _edge(self, name: str, request: Message, context: Context) -> GrpcEdge:
        wanted_id = str(getattr(request, "request_id", ""))
        keys = self._gateway.admin_keys
        return GrpcEdge(self._gateway, SERVICE.full_name, name, context, wanted_id, keys)
