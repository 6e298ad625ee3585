"""Server-sent events: a generation told piece by piece."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from cluster.errors import ExpertMeshError
from gateway.delta import ChoiceDelta
from gateway.errors import report_error
from gateway.generation import Generation
from gateway.http_edge import Responder, dump_json
from gateway.metrics import GatewayMetrics
from gateway.openai_format import ResponseFormat, usage_body
from gateway.tracing import note_error

logger = logging.getLogger(__name__)

PING_AFTER_S = 15.0
"""Silence after which a comment is sent, so that proxies keep the connection."""
_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
_DONE = b"data: [DONE]\n\n"
_PING = b": ping\n\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class SseStream:
    """Where and how a generation is told."""

    responder: Responder
    """The response."""
    formatter: ResponseFormat
    """The endpoint's chunks."""
    metrics: GatewayMetrics
    """Counts events."""
    request_id: str
    """For messages."""
    include_usage: bool = False
    """A chunk with the usage comes last."""
    continuous_usage: bool = False
    """Every chunk carries the usage so far."""
    ping_after_s: float = PING_AFTER_S
    """See ``PING_AFTER_S``."""


async def stream_generation(generation: Generation, stream: SseStream) -> None:
    """Tell a generation to its end.

    What goes wrong before the first byte is raised, for an ordinary error response; later it is
    told as an event.
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
    stream.metrics.sse_events.add()
    return b"data: " + dump_json(chunk) + b"\n\n"
