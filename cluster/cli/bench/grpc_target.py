"""Target of a workload that sends completions over gRPC."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc

from cluster.cli.bench.workload import RequestFailed
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.core.grpc_poller import keep_grpc_poller
from protos import inference_pb2 as pb
from protos import types_pb2
from protos.inference_pb2_grpc import InferenceStub

_DETAILS = "grpc-status-details-bin"
_EXITS = {
    grpc.StatusCode.UNAUTHENTICATED: ExitCode.UNAUTHORISED,
    grpc.StatusCode.PERMISSION_DENIED: ExitCode.UNAUTHORISED,
    grpc.StatusCode.INVALID_ARGUMENT: ExitCode.REFUSED,
    grpc.StatusCode.FAILED_PRECONDITION: ExitCode.REFUSED,
    grpc.StatusCode.NOT_FOUND: ExitCode.REFUSED,
    grpc.StatusCode.UNIMPLEMENTED: ExitCode.REFUSED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ExitCode.NOT_READY,
    grpc.StatusCode.DEADLINE_EXCEEDED: ExitCode.NOT_READY,
    grpc.StatusCode.UNAVAILABLE: ExitCode.NOT_READY,
}


class GrpcTarget:
    """Sends completions over gRPC on one channel; see ``BenchTarget``."""

    def __init__(
        self,
        address: str,
        *,
        headers: Mapping[str, str],
        tls_files: Mapping[str, str | None] | None,
        model: str | None,
        cache_salt: str,
        timeout_s: float,
    ) -> None:
        """``tls_files``: paths of ``ca_cert``, ``client_cert``, ``client_key``; None: no TLS."""
        keep_grpc_poller()
        if tls_files is None:
            self._channel = grpc.aio.insecure_channel(address)
        else:
            self._channel = grpc.aio.secure_channel(address, _credentials(tls_files))
        self._stub: Any = InferenceStub(self._channel)
        key = headers.get("Authorization")
        self._metadata = (("authorization", key),) if key else ()
        self._model = model or ""
        self._cache_salt = cache_salt
        self._timeout_s = timeout_s

    async def vocab_size(self) -> int:
        """Return the size of the model's vocabulary. Raises ``RequestFailed``."""
        request = pb.GetModelInfoRequest(model=self._model)
        try:
            info = await self._stub.GetModelInfo(
                request, metadata=self._metadata, timeout=self._timeout_s
            )
        except grpc.aio.AioRpcError as err:
            raise _failure(err) from err
        return int(info.vocab_size)

    async def complete(
        self, prompt: Sequence[int], max_tokens: int, on_piece: Callable[[], None]
    ) -> int:
        request = pb.GenerateRequest(
            model=self._model,
            token_ids=types_pb2.TokenIds(ids=prompt),
            sampling_params=types_pb2.SamplingParams(max_tokens=max_tokens, ignore_eos=True),
            cache_salt=self._cache_salt,
        )
        tokens, is_whole = 0, False
        try:
            async for chunk in self._stub.GenerateStream(request, metadata=self._metadata):
                tokens += len(chunk.token_ids)
                is_whole |= chunk.HasField("finish_info")
                on_piece()
        except grpc.aio.AioRpcError as err:
            raise _failure(err) from err
        if not is_whole:
            raise RequestFailed("cut off", "the stream ended before the text was finished")
        return tokens

    async def close(self) -> None:
        await self._channel.close(None)


def _credentials(files: Mapping[str, str | None]) -> grpc.ChannelCredentials:
    read = {name: Path(path).read_bytes() if path else None for name, path in files.items()}
    return grpc.ssl_channel_credentials(
        read["ca_cert"], private_key=read["client_key"], certificate_chain=read["client_cert"]
    )


def _failure(err: grpc.aio.AioRpcError) -> RequestFailed:
    """Convert a gRPC error to ``RequestFailed``.

    ``UNAVAILABLE`` without the server's error details means that no server was reached.
    """
    code = err.code()
    exit_code = _EXITS.get(code, ExitCode.FAILED)
    metadata: Any = err.trailing_metadata() or ()
    is_told = _DETAILS in dict(metadata)
    if code is grpc.StatusCode.UNAVAILABLE and not is_told:
        exit_code = ExitCode.UNREACHABLE
    return RequestFailed(code.name, err.details() or code.name, exit_code)
