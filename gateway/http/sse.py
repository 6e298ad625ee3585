"""Streams of server-sent events for running calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from gateway.calls.gateway import Gateway
from gateway.calls.running_call import RunningCall
from gateway.core.delta import ChoiceDelta
from gateway.core.errors import ErrorReport
from gateway.http.json_output import dump_json, dump_long
from gateway.http.middleware import Responder
from gateway.http.openai_format import OpenAIFormat, usage_object
from gateway.http.schema import ChatStreamOptionsBody
from gateway.offload.long_work import INLINE_SIZE, free_gradually

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"


@dataclass(kw_only=True, slots=True)
class EventStream(ABC):
    """Sends the output of one call as events. Subclasses implement the events of a protocol."""

    gateway: Gateway
    responder: Responder
    request_id: str

    async def send(self, running: RunningCall) -> None:
        """Send the output of a running call as it arrives, until the call ends.

        Errors before the first byte are raised, for an ordinary error response. Later errors are
        sent as events.
        """
        ping_after_s = self.gateway.tuning.ping_after_s
        deltas = await running.next(ping_after_s)
        await self.responder.start(200, _HEADERS)
        try:
            if opening := self._opening():
                await self.responder.body(opening, more=True)
            while deltas or not running.is_finished:
                size = sum([delta.size for delta in deltas])
                content = (
                    await self.gateway.long_work.run(size, self._events, running, deltas)
                    if deltas
                    else self._ping(running)
                )
                if content:
                    await self.responder.body(content, more=True)
                if deltas:
                    running.mark_sent()
                deltas = await running.next(ping_after_s)
            ending = await self._ending(running)
        except Exception as err:
            ending = self._failure(self.gateway.report_error(err, self.request_id))
        await self.responder.body(ending)

    def _opening(self) -> bytes:
        """Return bytes to send before the first events."""
        return b""

    def _ping(self, running: RunningCall) -> bytes:
        """Return bytes that keep an idle connection open."""
        return _PING

    @abstractmethod
    def _events(self, running: RunningCall, deltas: list[ChoiceDelta]) -> bytes:
        """Return the events of new deltas; empty if their text may still change."""

    @abstractmethod
    async def _ending(self, running: RunningCall) -> bytes:
        """Return the last bytes of a stream without an error."""

    @abstractmethod
    def _failure(self, report: ErrorReport) -> bytes:
        """Return the last bytes of a stream that failed."""

    def _event(self, data: bytes, name: bytes = b"") -> bytes:
        self.gateway.metrics.sse_events.inc()
        return b"%b%bdata: %b\n\n" % (b"event: " if name else b"", name and name + b"\n", data)


@dataclass(kw_only=True, slots=True)
class SseStream(EventStream):
    """A stream of OpenAI chunks."""

    formatter: OpenAIFormat
    options: ChatStreamOptionsBody

    def _events(self, running: RunningCall, deltas: list[ChoiceDelta]) -> bytes:
        content = b""
        with_usage = self.options.continuous_usage_stats
        for delta in deltas:
            if not with_usage and (text_chunk := self.formatter.text_chunk(delta)) is not None:
                content += self._event(text_chunk)
                continue
            is_long = delta.size > INLINE_SIZE  # for example with the logprobs of a long prompt
            for chunk in self.formatter.chunks(delta):
                if with_usage:
                    chunk["usage"] = usage_object(running.usage)
                content += self._event(dump_long(chunk) if is_long else dump_json(chunk))
                if is_long:
                    free_gradually(chunk)
        return content

    async def _ending(self, running: RunningCall) -> bytes:
        if not self.options.include_usage:
            return DONE
        return self._event(dump_json(self.formatter.usage_chunk(running.usage))) + DONE

    def _failure(self, report: ErrorReport) -> bytes:
        return self._event(dump_json(report.body())) + DONE
