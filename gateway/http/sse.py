"""Server-sent events: a generation piece by piece."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.core.delta import ChoiceDelta
from gateway.core.errors import ErrorReport
from gateway.generation.gateway import Gateway
from gateway.generation.generation import Generation
from gateway.http.middleware import Responder, dump_json
from gateway.http.openai_format import AnswerFormat, usage_body
from gateway.http.schema import StreamOptions

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


@dataclass(kw_only=True, slots=True)
class EventStream(ABC):
    """One stream: its target, and how a protocol writes its events."""

    gateway: Gateway
    responder: Responder
    request_id: str

    async def send(self, generation: Generation) -> None:
        """Send a generation piece by piece until its end.

        Errors before the first byte are raised, for an ordinary error response; later ones are sent
        as events.
        """
        ping_after_s = self.gateway.tuning.ping_after_s
        deltas = await generation.next(ping_after_s)
        await self.responder.start(200, _HEADERS)
        try:
            while deltas or not generation.is_finished:
                content = self._pieces(generation, deltas) if deltas else self._ping(generation)
                if content:
                    await self.responder.body(content, more=True)
                if deltas:
                    generation.sent()
                deltas = await generation.next(ping_after_s)
            ending = await self._end(generation)
        except Exception as err:
            ending = self._error(self.gateway.report_error(err, self.request_id))
        await self.responder.body(ending)

    @abstractmethod
    def _pieces(self, generation: Generation, deltas: Sequence[ChoiceDelta]) -> bytes:
        """Events of the next pieces; empty where nothing is certain yet."""

    @abstractmethod
    def _ping(self, generation: Generation) -> bytes:
        """What keeps a silent connection open."""

    @abstractmethod
    async def _end(self, generation: Generation) -> bytes:
        """The last events."""

    @abstractmethod
    def _error(self, report: ErrorReport) -> bytes:
        """The last events after an error."""


@dataclass(kw_only=True, slots=True)
class SseStream(EventStream):
    """OpenAI's chunks."""

    formatter: AnswerFormat
    options: StreamOptions

    def _pieces(self, generation: Generation, deltas: Sequence[ChoiceDelta]) -> bytes:
        content = b""
        with_usage = self.options.continuous_usage_stats
        for delta in deltas:
            if not with_usage and (text_chunk := self.formatter.text_chunk(delta)) is not None:
                content += self._event(text_chunk)
                continue
            for chunk in self.formatter.chunks(delta):
                if with_usage:
                    chunk["usage"] = usage_body(generation.usage)
                content += self._event(dump_json(chunk))
        return content

    def _ping(self, generation: Generation) -> bytes:
        return PING

    async def _end(self, generation: Generation) -> bytes:
        if not self.options.include_usage:
            return DONE
        return self._event(dump_json(self.formatter.usage_chunk(generation.usage))) + DONE

    def _error(self, report: ErrorReport) -> bytes:
        return self._event(dump_json(report.body())) + DONE

    def _event(self, chunk: bytes) -> bytes:
        self.gateway.metrics.sse_events.inc()
        return b"data: " + chunk + b"\n\n"
