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
"""Parents of the spans of a step."""


class StepParents(Message, frozen=True, array_like=True):
    """The parent spans of one request for the spans of its steps."""

    prefill: SpanIdBytes
    """Parent for steps that run rows of its prompt."""
    decode: SpanIdBytes
    """Parent for all other steps of the request."""
