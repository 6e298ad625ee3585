"""Below which spans those of a request's steps are: sent with a sampled request, and with a step.

What is not sampled has none.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from cluster.core.codec import Message, SpanIdBytes

MAX_TRACED = 4
"""Requests whose spans one step has, over all ranks."""
Parents = Annotated[tuple[SpanIdBytes, ...], Meta(max_length=MAX_TRACED)]
"""Spans of requests, below which the spans of a step are."""


class StepParents(Message, frozen=True, array_like=True):
    """The spans of one request below which those of its steps are."""

    prefill: SpanIdBytes
    """Of the steps that run rows of its prompt."""
    decode: SpanIdBytes
    """Of its other steps."""
