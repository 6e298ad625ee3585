"""Server-sent events: a generation piece by piece."""

from __future__ import annotations

from dataclasses import dataclass

from gateway.core.delta import ChoiceDelta
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
_DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class SseStream:
    """One stream: its target, and what it carries beside the text."""

    gateway: Gateway
    responder: Responder
    formatter: AnswerFormat
    request_id: str
    options: StreamOptions

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
                content = self._events(generation, deltas) if deltas else _PING
                await self.responder.body(content, more=True)
                if deltas:
                    generation.sent()
                deltas = await generation.next(ping_after_s)
            ending = _DONE
            if self.options.include_usage:
                ending = (
                    self._event(dump_json(self.formatter.usage_chunk(generation.usage))) + _DONE
                )
        except Exception as err:
            report = self.gateway.report_error(err, self.request_id)
            ending = self._event(dump_json(report.body())) + _DONE
        await self.responder.body(ending)

    def _events(self, generation: Generation, deltas: list[ChoiceDelta]) -> bytes:
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

    def _event(self, chunk: bytes) -> bytes:
        self.gateway.metrics.sse_events.inc()
        return b"data: " + chunk + b"\n\n"
