"""Parent spans for the spans of steps, sent with each sampled request and with each step.

A request that is not sampled for tracing has no parent spans.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from cluster.core.codec import Message, SpanIdBytes

MAX_TRACED = 4
"""Maximum number of traced requests in one step, over all ranks."""
Parents = Annotated[tuple[SpanIdBytes, ...], Meta(max_length=MAX_TRACED)]
"""Parent trace spans of the spans that workers record for a step."""


class StepParents(Message, frozen=True, array_like=True):
    """Parent trace spans of one request, for the spans of the steps that run its rows."""

    prefill: SpanIdBytes
    """Parent span for steps that run prompt rows of the request."""
    decode: SpanIdBytes
    """Parent span for steps that run decode rows of the request."""
