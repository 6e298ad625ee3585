"""When a gateway takes a worker for silent."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from gateway.cluster.view import AttentionEndpoint
from gateway.engines import engine_stream
from gateway.engines.engine_stream import PING_S, SILENCE_LIMIT_S, EngineStream


class Clock:
    """Virtual time, in which each sleep takes ``late_s`` longer. It ends after ``limit_s``."""

    def __init__(self, late_s: float, limit_s: float) -> None:
        self._late_s = late_s
        self._limit_s = limit_s
        self._now_s = 0.0

    def monotonic(self) -> float:
        return self._now_s

    async def sleep(self, seconds: float, real: Any = asyncio.sleep) -> None:
        if threading.current_thread() is not threading.main_thread():
            await real(seconds)  # of a stack that other tests use
            return
        self._now_s += seconds + self._late_s
        if self._now_s > self._limit_s:
            raise asyncio.CancelledError


class Call:
    is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


@pytest.mark.parametrize(
    ("late_s", "limit_s", "is_silent"),
    [
        (0.0, SILENCE_LIMIT_S + PING_S, True),
        (0.9 * PING_S, 3 * SILENCE_LIMIT_S, False),  # each iteration accepts many calls
    ],
)
def test_a_worker_is_not_silent_while_the_gateway_is_late(
    monkeypatch: pytest.MonkeyPatch, late_s: float, limit_s: float, is_silent: bool
) -> None:
    clock, call = Clock(late_s, limit_s), Call()

    async def ping(stream: EngineStream, call: Any) -> None:
        monkeypatch.setattr(asyncio, "sleep", clock.sleep)
        await stream._ping(call)

    async def run() -> int:
        endpoint = AttentionEndpoint("attention-0", "127.0.0.1:1", 1)
        stream = EngineStream(endpoint, token="", gateway="a")
        await asyncio.wait([asyncio.create_task(ping(stream, call))])
        return stream._outgoing.qsize()

    monkeypatch.setattr(engine_stream, "time", clock)
    num_pings = asyncio.run(run())
    assert num_pings >= min(limit_s, SILENCE_LIMIT_S) / 2, "the worker must not miss the gateway"
    assert call.is_cancelled is is_silent
