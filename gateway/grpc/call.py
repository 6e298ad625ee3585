"""Steps that all gRPC requests share: request id, limits, metrics and error mapping."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from gateway.auth.auth import KeyRing
from gateway.auth.key_limits import KeyUsage
from gateway.calls.gateway import Gateway
from gateway.calls.request_log import RequestLog
from gateway.calls.request_trace import CLIENT_GONE, DEADLINE_PASSED, RequestTrace
from gateway.core.call import GenerateCall
from gateway.core.delta import Usage
from gateway.core.headers import with_headers
from gateway.core.request_id import HEADER, REQUEST_ID, choose_request_id
from gateway.grpc.call_limits import BoundedStream, CallLimits, Context
from gateway.offload.long_work import Arguments, Result

_DEADLINE_SLACK_S = 0.1
"""Tolerance for deadlines in seconds. The cancellation of a call at its deadline arrives slightly
before the deadline that is computed here from the call's arrival."""


def text_metadata(metadata: Iterable[tuple[str, str | bytes]] | None) -> dict[str, str]:
    """Return the metadata of a client without binary values."""
    return {name: value for name, value in metadata or () if isinstance(value, str)}


@dataclass(eq=False)
class GrpcCall:
    """One gRPC request, from its metadata to its status."""

    gateway: Gateway
    service: str
    method: str
    context: Context
    keys: KeyRing
    """API keys of the port."""
    limits: CallLimits
    """Limits of the port."""
    stream_s: float | None = None
    """Longest duration of an endless stream in seconds; None for other calls."""
    size: int = 0
    """Bytes of the request message; 0 before it is read."""
    response_size: int = 0
    """Approximate bytes of the response; 0 for a method whose response is always short."""
    _code: grpc.StatusCode = grpc.StatusCode.OK
    _trace: RequestTrace | None = None
    _has_sent_id: bool = False
    _stream: BoundedStream = field(init=False)

    def __post_init__(self) -> None:
        limits = self.limits
        times = limits.read_limit_s, limits.write_limit_s
        self._stream = BoundedStream(self.context, *times, limits.unread)
        metadata = self.context.invocation_metadata() or ()
        self.metadata = text_metadata(metadata)
        self.request_id = choose_request_id(self.metadata.get(HEADER, ""))
        self._line = RequestLog("grpc", self.method)
        if self.gateway.tracing is not None:
            begin = self.gateway.tracing.begin
            self._trace = begin(self.method, "grpc", self.request_id, metadata)

    async def read(self) -> bytes | None:
        """Read the next message; None after the last one. Raises ``DeadlineExceededError``."""
        data = await self._stream.read()
        self.size = len(data or b"")
        return data

    async def write(self, message: Any) -> None:
        """Send a message, after the request id. Raises ``SlowClientError``."""
        await self.send_id()
        await self._stream.write(message)

    def set_id(self, wanted: str) -> None:
        """Replace the request id by ``wanted``, the message's field, unless it is empty."""
        if wanted:
            self.request_id = choose_request_id(wanted)
            REQUEST_ID.set(self.request_id)
            if self._trace is not None:
                self._trace.request_id = self.request_id

    @property
    def time_left_s(self) -> float | None:
        """Seconds until the client's deadline; None without a deadline."""
        left_s: float | None = self.context.time_remaining()
        return left_s

    def with_headers(self, fields: GenerateCall) -> GenerateCall:
        """Set the time limit of a call; fill unset priority and session from the metadata."""
        return with_headers(fields, self.metadata, self.time_left_s)

    async def convert(
        self, work: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Run ``work`` on the message, in a thread if the message is large."""
        return await self.gateway.long_work.run(self.size, work, *args, **kwargs)

    def set_usage(self, usage: Usage) -> None:
        """Send token counts as trailing metadata."""
        counts = {"prompt": usage.prompt_tokens, "completion": usage.completion_tokens}
        if usage.cached_tokens is not None:
            counts["cached"] = usage.cached_tokens
        self.context.set_trailing_metadata(
            tuple((f"x-{name}-tokens", str(count)) for name, count in counts.items())
        )

    @asynccontextmanager
    async def served(self) -> AsyncIterator[None]:
        """Run a request within the limits of its key and port. An error becomes the status."""
        given, unsent_error = self.metadata, ""
        caller: KeyUsage | None = None
        try:
            try:
                caller = self.keys.enter(given.get("authorization"), given.get("api-key"))
                REQUEST_ID.set(self.request_id)
                async with self.limits.entered(self.context.peer(), self.stream_s):
                    yield
            except Exception as err:
                await self._abort(err)
        except (asyncio.CancelledError, GeneratorExit):
            if self.time_left_s is not None and self.time_left_s < _DEADLINE_SLACK_S:
                self._code, unsent_error = grpc.StatusCode.DEADLINE_EXCEEDED, DEADLINE_PASSED
            else:
                self._code, unsent_error = grpc.StatusCode.CANCELLED, CLIENT_GONE
                self.gateway.metrics.client_disconnects.inc()
            raise
        finally:
            if caller is not None:
                caller.leave(time.monotonic())
            code, requests = self._code.name, self.gateway.metrics.grpc_requests
            requests.labels(self.service, self.method, code).inc()
            if self._trace is not None:
                self._trace.end(unsent_error)
            self._line.end(code)

    async def send_id(self) -> None:
        """Send request id and placement epoch as initial metadata, unless they were sent."""
        if self._has_sent_id:
            return
        self._has_sent_id = True
        epoch = str(self.gateway.shared.models.default.placement_epoch)
        metadata = ((HEADER, self.request_id), ("x-placement-epoch", epoch))
        await self.context.send_initial_metadata(metadata)

    async def _abort(self, error: Exception) -> None:
        """End the request with the status of ``error``.

        Raises gRPC's error, unless a message waits for the client: the status then follows it.
        """
        report = self.gateway.report_error(error, self.request_id)
        self._code = report.grpc_code
        await self.send_id()
        details = report.status_details(self.request_id)
        await self._stream.abort(error, report, (("grpc-status-details-bin", details),))
