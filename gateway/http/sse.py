"""Server-sent events: a generation piece by piece."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from cluster.core.errors import ExpertMeshError
from gateway.core.delta import ChoiceDelta
from gateway.core.errors import report_error
from gateway.generation.generation import Generation
from gateway.generation.request_trace import note_error
from gateway.http.edge import Responder, dump_json
from gateway.http.openai_format import AnswerFormat, usage_body
from gateway.observability.metrics import GatewayMetrics

logger = logging.getLogger(__name__)

_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
_DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class SseStream:
    """The target and the options of one stream."""

    responder: Responder
    formatter: AnswerFormat
    metrics: GatewayMetrics
    request_id: str
    ping_after_s: float
    include_usage: bool = False
    """A chunk with the usage comes last."""
    continuous_usage: bool = False
    """Every chunk carries the usage so far."""


async def stream_generation(generation: Generation, stream: SseStream) -> None:
    """Send a generation piece by piece until its end.

    Errors before the first byte are raised, for an ordinary error response; later ones are sent as
    events.
    """
    deltas = await generation.next(stream.ping_after_s)
    await stream.responder.start(200, _HEADERS)
    try:
        while deltas or not generation.is_finished:
            content = _events(generation, stream, deltas) if deltas else _PING
            await stream.responder.body(content, more=True)
            if deltas:
                generation.sent()
            deltas = await generation.next(stream.ping_after_s)
        ending = _DONE
        if stream.include_usage:
            ending = _event(stream, stream.formatter.usage_chunk(generation.usage)) + _DONE
    except Exception as err:
        if not isinstance(err, ExpertMeshError):
            logger.error("request %s failed in its stream", stream.request_id, exc_info=err)
        report = report_error(err, stream.request_id)
        note_error(report.code)
        ending = _event(stream, report.body()) + _DONE
    await stream.responder.body(ending)


def _events(generation: Generation, stream: SseStream, deltas: list[ChoiceDelta]) -> bytes:
    content = b""
    for delta in deltas:
        for chunk in stream.formatter.chunks(delta):
            if stream.continuous_usage:
                chunk["usage"] = usage_body(generation.usage)
            content += _event(stream, chunk)
    return content


def _event(stream: SseStream, chunk: object) -> bytes:
    stream.metrics.sse_events.inc()
    return b"data: " + dump_json(chunk) + b"\n\n"
