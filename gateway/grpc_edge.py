"""What every gRPC request passes, whatever its service: an id, a count, the error table."""

from __future__ import annotations

import asyncio
import logging
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NoReturn

import grpc

from cluster.errors import ExpertMeshError
from gateway.core import Gateway
from gateway.errors import report_error
from gateway.request_id import HEADER, choose_request_id

logger = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]


class GrpcEdge(AbstractContextManager["GrpcEdge"]):
    """One gRPC request from its metadata to its status: names it, counts it, maps errors."""

    def __init__(
        self, gateway: Gateway, service: str, method: str, context: Context, wanted_id: str
    ) -> None:
        given = dict(context.invocation_metadata() or ())
        self.request_id = choose_request_id(wanted_id or str(given.get(HEADER, "")))
        self._gateway = gateway
        self._service = service
        self._method = method
        self._context = context
        self._code = grpc.StatusCode.OK

    async def send_initial_metadata(self) -> None:
        """Tell the client its request id, before any token."""
        epoch = str(self._gateway.placement_epoch)
        metadata = ((HEADER, self.request_id), ("x-placement-epoch", epoch))
        await self._context.send_initial_metadata(metadata)

    async def abort(self, error: Exception) -> NoReturn:
        """End the request with the status that belongs to ``error``."""
        report = report_error(error, self.request_id)
        self._code = report.grpc_code
        if not isinstance(error, ExpertMeshError):
            logger.error("request %s failed", self.request_id, exc_info=error)
        details = report.status_details(self.request_id)
        trailers = (("grpc-status-details-bin", details),)
        await self._context.abort(report.grpc_code, report.message, trailers)
        raise AssertionError("abort always raises")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            self._code = grpc.StatusCode.CANCELLED
            self._gateway.metrics.client_disconnects.add()
        self._gateway.metrics.grpc_requests.add(self._service, self._method, self._code.name)
