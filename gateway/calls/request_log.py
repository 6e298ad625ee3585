"""Writes one log line per finished request: route, status, duration and tokens.

``HttpMiddleware`` and ``GrpcCall`` begin and end a ``RequestLog``; ``Gateway`` adds the call.
"""

from __future__ import annotations

import logging
import time
from contextvars import ContextVar
from typing import Any, Literal

from gateway.calls.running_call import RunningCall

logger = logging.getLogger(__name__)


class RequestLog:
    """Log entry of one request; the line contains no text of the client except the request id."""

    def __init__(self, port: Literal["http", "grpc"], name: str) -> None:
        """Begin the entry of a request. ``name`` is the HTTP route or the gRPC method."""
        self._port, self._name = port, name
        self._began_s = time.monotonic()
        self.running: RunningCall | None = None
        """Running call of the request; None if the request was refused or needs no engine."""
        CURRENT.set(self)

    def end(self, status: str) -> None:
        """Write the log line of the request. ``status`` is the HTTP or gRPC status."""
        running, self.running = self.running, None  # timers of the connection keep this entry
        if not logger.isEnabledFor(logging.INFO):
            return
        now_s = time.monotonic()
        fields: dict[str, Any] = {"port": self._port, "route": self._name, "status": status}
        fields["ms"] = _ms(now_s - self._began_s)
        if running is not None:
            usage = running.usage
            fields["prompt_tokens"] = usage.prompt_tokens
            fields["output_tokens"] = usage.completion_tokens
            if usage.cached_tokens is not None:
                fields["cached_tokens"] = usage.cached_tokens
            if (first_s := running.first_token_s) is not None:
                fields["ttft_ms"] = _ms(first_s - running.started_s)
        logger.info("request ended", extra=fields)


CURRENT: ContextVar[RequestLog | None] = ContextVar("CURRENT", default=None)
"""Log entry of the request that the current task serves."""


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)
