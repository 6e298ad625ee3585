"""Makes the child spans of a finished request; ``gateway.calls.tracing`` lists the spans."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice

from cluster.tracing import names
from cluster.tracing.exporter import AttributeValue, Context, SpanId, TraceExport
from gateway.calls.choices import Choice, Prompt
from gateway.calls.request_trace import RequestTrace
from gateway.calls.running_call import RunningCall
from gateway.cluster.events import ClusterEvents, Event

Attributes = dict[str, AttributeValue]
MAX_PROMPTS = 16
"""Maximum number of prompts of a request for which spans are made."""


@dataclass(frozen=True, slots=True)
class CallSpans:
    """Makes the child spans of a finished request from the times of its running call."""

    export: TraceExport
    """Exporter of the spans."""
    cluster_events: ClusterEvents
    parent: Context
    day_ns: int
    """Unix time in nanoseconds at which ``time.monotonic`` is 0."""

    def record(self, trace: RequestTrace, running: RunningCall) -> None:
        """Record the child spans of a request: tokenization, each prompt, detokenization."""
        admitted_s, heard_s = running.admitted_s, running.queue.oldest_s
        closed_s = running.closed_s or trace.ended_s
        request: Attributes = {names.REQUEST_ID: trace.request_id}
        self._span(names.TOKENIZE, running.started_s, admitted_s, request)
        for index, prompt in enumerate(islice(running.prompts, MAX_PROMPTS)):
            span_id = trace.decodes[index] if index < len(trace.decodes) else None
            self._record_prompt(prompt, admitted_s, closed_s, request, span_id)
        if running.makes_text and heard_s and not trace.error:
            self._span(names.DETOKENIZE, heard_s, closed_s, request)

    def _record_prompt(
        self,
        prompt: Prompt,
        admitted_s: float,
        closed_s: float,
        request: Attributes,
        span_id: SpanId | None,
    ) -> None:
        attributes = {
            **request,
            names.WORKER: prompt.submission.worker if prompt.submission else "",
            names.PLACEMENT_EPOCH: self.cluster_events.epoch_at(admitted_s),
        }
        chunks = _chunks(prompt.choices[0], admitted_s)
        self._span(names.QUEUE, admitted_s, chunks[0][0] if chunks else closed_s, attributes)
        cached = {} if prompt.cached_tokens is None else {names.CACHED_TOKENS: prompt.cached_tokens}
        for chunk in chunks:
            self._span(names.PREFILL, *chunk, attributes | cached)
        begins_s = [c.first_token_s for c in prompt.choices if c.first_token_s is not None]
        if begins_s:
            self._record_decode(prompt, min(begins_s), closed_s, attributes, span_id)

    def _record_decode(
        self,
        prompt: Prompt,
        began_s: float,
        closed_s: float,
        attributes: Attributes,
        span_id: SpanId | None,
    ) -> None:
        is_over = all(choice.finish is not None for choice in prompt.choices)
        last_s = max(choice.last_token_s or 0.0 for choice in prompt.choices)
        ended_s = last_s if is_over else closed_s
        preempted_s = [when_s for choice in prompt.choices for when_s in _preemptions(choice)]
        replays_s = prompt.submission.replays_s if prompt.submission else ()
        events = [
            Event(began_s, names.FIRST_TOKEN),
            *(Event(when_s, names.PREEMPTED) for when_s in preempted_s),
            *(Event(when_s, names.REPLAYED) for when_s in replays_s),
            *self.cluster_events.between(began_s, ended_s),
        ]
        preemptions = {names.PREEMPTIONS: len(preempted_s)}
        self._span(names.DECODE, began_s, ended_s, attributes | preemptions, events, span_id)

    def _span(
        self,
        name: str,
        began_s: float,
        ended_s: float,
        attributes: Attributes,
        events: Iterable[Event] = (),
        span_id: SpanId | None = None,
    ) -> None:
        export, began_ns = self.export, self._ns(began_s)
        start = (
            export.tracer.start_span if span_id is None else partial(export.start_with_id, span_id)
        )
        span = start(name, self.parent, attributes=attributes, start_time=began_ns)
        for event in sorted(events, key=lambda event: event.when_s):
            span.add_event(event.name, event.attributes, self._ns(event.when_s))
        span.end(self._ns(max(began_s, ended_s)))

    def _ns(self, when_s: float) -> int:
        return self.day_ns + round(when_s * 1e9)


def _chunks(choice: Choice, admitted_s: float) -> list[tuple[float, float]]:
    """Return begin and end of each prefill chunk of a prompt, in monotonic seconds of the gateway.

    The engine's times are from another clock. They are shifted so that the first token was sampled
    when it arrived at the gateway; without a token, so that the engine received the prompt at
    ``admitted_s``.
    """
    timings, received_s = choice.first_timings or choice.last_timings, admitted_s
    if timings is None:
        return []
    if choice.first_token_s is not None:
        received_s = choice.first_token_s - timings.first_token_s
    ends_s = (*timings.prefill_s[1:], timings.first_token_s)
    return [
        (max(admitted_s, received_s + began_s), max(admitted_s, received_s + ended_s))
        for began_s, ended_s in zip(timings.prefill_s, ends_s, strict=False)
    ]


def _preemptions(choice: Choice) -> list[float]:
    timings, output_s = choice.last_timings, choice.last_token_s
    if timings is None:
        timings, output_s = choice.first_timings, choice.first_token_s
    if timings is None or output_s is None:
        return []
    received_s = output_s - timings.finished_s
    return [received_s + after_s for after_s in timings.preempted_s]
