"""Calls over gRPC: the service ``expertmesh.v1.Inference``."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2

from cluster.core.grpc_poller import keep_grpc_poller
from expertmesh.errors import APIConnectionError, APIError, APITimeoutError, make_error
from expertmesh.messages import generate_request, request_output
from expertmesh.options import DEFAULT_TIMEOUT_S, ClientOptions, tls_context
from expertmesh.types import PlainPrompt, PoolingTask, Query, RequestOutput
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from protos.types_pb2 import TokenIds


class GrpcTransport:
    """``Transport`` over gRPC. Construct it on the event loop that makes the calls.

    Args:
        address: ``host:port`` of the server.
        is_tls: whether to use TLS.
        options: options of the client.
    """

    def __init__(self, address: str, is_tls: bool, options: ClientOptions) -> None:
        keep_grpc_poller()
        limits = (("grpc.max_receive_message_length", 1 << 30),)
        self._channel = (
            grpc.aio.secure_channel(address, _credentials(options), limits)
            if is_tls
            else grpc.aio.insecure_channel(address, limits)
        )
        self._stub: Any = InferenceStub(self._channel)
        key = options.get("api_key")
        metadata = () if key is None else (("authorization", f"Bearer {key}"),)
        timeout_s = options.get("timeout_s", DEFAULT_TIMEOUT_S)
        self._options: dict[str, Any] = {"metadata": metadata, "timeout": timeout_s}

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
                yield request_output(chunk, query)
        except grpc.aio.AioRpcError as err:
            raise _error(err) from err
        finally:
            call.cancel()

    async def encode(
        self, prompt: PlainPrompt, task: PoolingTask, pooling: str | None, model: str | None
    ) -> list[float]:
        if isinstance(prompt, str):
            one = pb.Input(text=prompt)
        else:
            one = pb.Input(token_ids=TokenIds(ids=prompt))
        try:
            if task == "classify":
                request = pb.ClassifyRequest(model=model or "", input=[one])
                response = await self._stub.Classify(request, **self._options)
                return list(response.data[0].probs)
            embed = pb.EmbedRequest(model=model or "", input=[one], pooling=pooling or "")
            response = await self._stub.Embed(embed, **self._options)
            return list(response.data[0].values)
        except grpc.aio.AioRpcError as err:
            raise _error(err) from err

    async def close(self) -> None:
        await self._channel.close(None)


def _credentials(options: ClientOptions) -> grpc.ChannelCredentials:
    tls_context(options)  # checks the files: gRPC ignores bad ones or aborts the process
    certificate = options.get("client_cert")
    paths = (options.get("ca_cert"), options.get("client_key") or certificate, certificate)
    files = [Path(path).read_bytes() if path else None for path in paths]
    return grpc.ssl_channel_credentials(*files)


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
    status = 413 if reason.reason == "request_too_large" else err.code().name
    return make_error(message, reason.reason, param, status, after_s)
