"""Calls over gRPC: the service ``expertmesh.v1.Inference``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from expertmesh.errors import APIConnectionError, APIError, APITimeoutError, make_error
from expertmesh.messages import generate_request, request_output, stream_output
from expertmesh.types import Query, RequestOutput
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from protos.types_pb2 import TokenIds

_MAX_BYTES = 1 << 30
_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNIMPLEMENTED: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.DEADLINE_EXCEEDED: 408,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.FAILED_PRECONDITION: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
}


class GrpcTransport:
    """``Transport`` over gRPC. Construct it on the event loop that makes the calls.

    Args:
        address: ``host:port`` of the server.
        tls: whether to use TLS, with the certificates of the system.
        api_key: sent as bearer token; None sends none.
        timeout_s: maximum duration of a call in seconds.
    """

    def __init__(self, address: str, tls: bool, api_key: str | None, timeout_s: float) -> None:
        options = (("grpc.max_receive_message_length", _MAX_BYTES),)
        self._channel = (
            grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(), options)
            if tls
            else grpc.aio.insecure_channel(address, options)
        )
        self._stub: Any = InferenceStub(self._channel)
        key = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._options: dict[str, Any] = {"metadata": key, "timeout": timeout_s}

    async def generate(self, query: Query) -> RequestOutput:
        request = generate_request(query)
        try:
            return request_output(await self._stub.Generate(request, **self._options), query)
        except grpc.aio.AioRpcError as err:
            raise _error(err) from err

    async def stream(self, query: Query) -> AsyncGenerator[RequestOutput]:
        call = self._stub.GenerateStream(generate_request(query), **self._options)
        try:
            async for chunk in call:
                yield stream_output(chunk, query)
        except grpc.aio.AioRpcError as err:
            raise _error(err) from err
        finally:
            call.cancel()

    async def embed(
        self, prompt: str | tuple[int, ...], pooling: str | None, model: str | None
    ) -> list[float]:
        if isinstance(prompt, str):
            one = pb.Input(text=prompt)
        else:
            one = pb.Input(token_ids=TokenIds(ids=prompt))
        request = pb.EmbedRequest(model=model or "", input=[one], pooling=pooling or "")
        try:
            response = await self._stub.Embed(request, **self._options)
        except grpc.aio.AioRpcError as err:
            raise _error(err) from err
        return list(response.data[0].values)

    async def close(self) -> None:
        await self._channel.close(None)


def _error(err: grpc.aio.AioRpcError) -> APIError:
    """Convert a gRPC status. A status without details is from the gRPC library, not the server."""
    metadata: Any = err.trailing_metadata() or ()
    data = dict(metadata).get("grpc-status-details-bin")
    message = err.details() or err.code().name
    if data is None and err.code() is grpc.StatusCode.UNAVAILABLE:
        return APIConnectionError(message)
    if data is None and err.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return APITimeoutError(message, "deadline_exceeded")
    reason, field = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    for detail in status_pb2.Status.FromString(data or b"").details:
        for kind in (reason, field, retry):
            detail.Unpack(kind)
    param = field.field_violations[0].field if field.field_violations else None
    after_s = retry.retry_delay.ToMilliseconds() / 1000 or None
    return make_error(message, reason.reason, param, _STATUS.get(err.code(), 500), after_s)
