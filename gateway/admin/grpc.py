"""The admin service over gRPC, on its own port."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from google.protobuf.message import Message

from gateway.admin.calls import SERVICE
from gateway.admin.revision_calls import AdminCallsByModel
from gateway.calls.gateway import Gateway
from gateway.grpc.call import GrpcCall
from gateway.grpc.handlers import Procedure
from gateway.grpc.server import ServicePort, server_options

MODEL_HEADER = "x-expertmesh-model"
"""Metadata that names the model that a call concerns, if several are served."""
_MAX_CALLS = 256
_MAX_CONNECTIONS = 256


class AdminGrpcServer(ServicePort):
    """gRPC server of ``expertmesh.v1.Admin``.

    Args:
        gateway: the replica.
        host: interface to listen on.
        port: port number; 0 selects a free port.
        shared: whether several replicas of this host listen on the port.
    """

    def __init__(self, gateway: Gateway, host: str, port: int, *, shared: bool = False) -> None:
        self._calls = AdminCallsByModel(gateway)
        super().__init__(
            gateway,
            SERVICE,
            self._find,
            gateway.admin_keys,
            host,
            port,
            options=server_options(shared, _MAX_CONNECTIONS),
            max_calls=_MAX_CALLS,
            endless=("WatchCluster",),
        )

    def _find(self, name: str) -> Procedure:
        def procedure(call: GrpcCall) -> Any:
            return self._calls.of(name, call.metadata.get(MODEL_HEADER))

        if not SERVICE.methods_by_name[name].server_streaming:
            return lambda request, call: procedure(call)(request)

        async def stream(request: Message, call: GrpcCall) -> AsyncGenerator[Message]:
            await call.send_id()
            async with aclosing(procedure(call)(request)) as answers:
                async for answer in answers:
                    yield answer

        return stream
