"""Where the spans of a request's steps belong: sent with a sampled request, and with a step.

A ``SpanPlace`` is the 16 bytes of a trace's id and the 8 bytes of the id of the span above; both
ids are those of W3C Trace Context, as bytes. What is not sampled has none.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from cluster.core.codec import Message

_TRACE_ID_BYTES, _SPAN_ID_BYTES = 16, 8
SpanPlace = Annotated[
    bytes,
    Meta(min_length=_TRACE_ID_BYTES + _SPAN_ID_BYTES, max_length=_TRACE_ID_BYTES + _SPAN_ID_BYTES),
]
MAX_TRACED = 4
"""Requests of a rank whose spans one step has."""
Places = Annotated[tuple[SpanPlace, ...], Meta(max_length=MAX_TRACED)]


class RequestPlaces(Message, frozen=True, array_like=True):
    """Of one request."""

    prefill: SpanPlace
    """Of the steps that run rows of its prompt."""
    decode: SpanPlace
    """Of its other steps."""
