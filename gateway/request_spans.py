"""The spans of a request that is over, made of what was noted meanwhile. Pure.

chat tiny                    the whole request, as its client knows it
  expertmesh.tokenize        prompts to tokens
  expertmesh.queue           of each prompt: until its first rows went to the experts
  expertmesh.prefill         of each chunk of it
  expertmesh.decode          from its first token to its last
  expertmesh.detokenize      from the last news of the engines to the end
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cluster import spans
from cluster.spans import Span, SpanEvent, Value
from gateway.call import CallKind, GenerateFields
from gateway.call_notes import CallNotes, ChoiceNotes, PromptNotes
from gateway.cluster_moments import ClusterMoments, Moment

MAX_PROMPTS = 16
"""Prompts of a request whose parts are told, the first ones."""
_REQUESTED = {
    spans.MAX_TOKENS: "max_tokens",
    spans.TEMPERATURE: "temperature",
    spans.TOP_P: "top_p",
    spans.TOP_K: "top_k",
    spans.SEED: "seed",
    spans.FREQUENCY_PENALTY: "frequency_penalty",
    spans.PRESENCE_PENALTY: "presence_penalty",
    spans.CHOICE_COUNT: "n",
}
"""Attributes that are fields, as the client has set them."""
Decode = Callable[[Sequence[int]], str]
"""Makes text of tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clock:
    """The time of day at a moment of ``time.monotonic``."""

    day_ns: int
    """Since 1970."""
    monotonic_s: float
    """At the same moment."""

    def ns(self, when_s: float) -> int:
        """The time of day of another moment."""
        return self.day_ns + round((when_s - self.monotonic_s) * 1e9)


@dataclass(frozen=True, kw_only=True, slots=True)
class EndedRequest:
    """What was noted of a request."""

    operation: str
    """As far as its route tells."""
    request_id: str
    """As in ``x-request-id``."""
    response_id: str | None
    """As in the answer; None: the call's own."""
    model: str
    """That is served."""
    server: Mapping[str, Value]
    """Where it came in: attributes."""
    clock: Clock
    """Its beginning."""
    ended_s: float
    """``time.monotonic``."""
    error: str
    """As in the answer's ``code``; empty: none."""
    fields: GenerateFields | None
    """What was asked for, within its limits; None where it was not, and of embeddings."""
    notes: CallNotes | None
    """Of the call; None where it was refused before it was one."""


def request_span(ended: EndedRequest, moments: ClusterMoments, decode: Decode | None) -> Span:
    """A request with all of its parts; ``decode`` where prompts and outputs are to be in it."""
    fields, notes, clock = ended.fields, ended.notes, ended.clock
    operation = _operation(ended)
    attributes: dict[str, Value] = {
        spans.OPERATION_NAME: operation,
        spans.PROVIDER_NAME: spans.PROVIDER,
        **ended.server,
    }
    if fields is not None:
        attributes |= _requested(fields)
    if notes is not None:
        attributes |= _answered(ended, notes)
        if decode is not None:
            attributes |= _content(fields, notes, decode)
    return Span(
        name=f"{operation} {ended.model}",
        began_ns=clock.day_ns,
        ended_ns=clock.ns(ended.ended_s),
        attributes=attributes,
        children=() if notes is None else tuple(_Parts(ended, notes, moments).all()),
        is_server=True,
        error=ended.error,
    )


def _operation(ended: EndedRequest) -> str:
    if ended.fields is None:
        return ended.operation
    return spans.CHAT if ended.fields.kind is CallKind.CHAT else spans.TEXT_COMPLETION


def _requested(fields: GenerateFields) -> Iterator[tuple[str, Value]]:
    for name, field in _REQUESTED.items():
        value = getattr(fields, field)
        if value is not None:
            yield name, value
    if fields.stop:
        yield spans.STOP_SEQUENCES, fields.stop


def _answered(ended: EndedRequest, notes: CallNotes) -> dict[str, Value]:
    usage = notes.usage
    reasons = [
        choice.finish_reason.value
        for prompt in notes.prompts
        for choice in prompt.choices
        if choice.finish_reason is not None
    ]
    return {
        spans.REQUEST_MODEL: notes.call.model,
        spans.RESPONSE_ID: ended.response_id or notes.call_id,
        spans.RESPONSE_MODEL: ended.model,
        spans.FINISH_REASONS: reasons,
        spans.INPUT_TOKENS: usage.prompt_tokens,
        spans.OUTPUT_TOKENS: usage.completion_tokens,
    }


def _content(fields: GenerateFields | None, notes: CallNotes, decode: Decode) -> dict[str, Value]:
    if fields is not None and fields.chat is not None:
        asked = [
            _message(str(message.get("role")), str(message.get("content") or ""))
            for message in fields.chat.messages
        ]
    else:
        asked = [
            _message("user", decode(prompt.ids) if prompt.text is None else prompt.text)
            for prompt in notes.call.prompts
        ]
    told = [
        _message("assistant", decode(choice.token_ids))
        | {"finish_reason": choice.finish_reason.value if choice.finish_reason else "error"}
        for prompt in notes.prompts
        for choice in prompt.choices
    ]
    return {spans.INPUT_MESSAGES: _json(asked), spans.OUTPUT_MESSAGES: _json(told)}


def _message(role: str, text: str) -> dict[str, object]:
    return {"role": role, "parts": [{"type": "text", "content": text}]}


def _json(content: object) -> str:
    return json.dumps(content, ensure_ascii=False)


class _Parts:
    """The children of a request's span."""

    def __init__(self, ended: EndedRequest, notes: CallNotes, moments: ClusterMoments) -> None:
        self._notes = notes
        self._clock = ended.clock
        self._moments = moments
        self._request: dict[str, Value] = {spans.REQUEST_ID: ended.request_id}
        self._has_failed = bool(ended.error)

    def all(self) -> Iterator[Span]:
        """Prompt by prompt, each in the order of time."""
        notes = self._notes
        yield self._part(spans.TOKENIZE, notes.started_s, notes.admitted_s, self._request)
        for prompt in notes.prompts[:MAX_PROMPTS]:
            yield from self._of_prompt(prompt)
        if notes.makes_text and notes.heard_s and not self._has_failed:
            yield self._part(spans.DETOKENIZE, notes.heard_s, notes.closed_s, self._request)

    def _of_prompt(self, prompt: PromptNotes) -> Iterator[Span]:
        began_s, first = self._notes.admitted_s, prompt.choices[0]
        attributes = {
            **self._request,
            spans.WORKER: prompt.worker,
            spans.PLACEMENT_EPOCH: self._moments.epoch_at(began_s),
        }
        chunks = _chunks(first, began_s)
        worked_s = chunks[0][0] if chunks else self._notes.closed_s
        yield self._part(spans.QUEUE, began_s, worked_s, attributes)
        cached = {} if prompt.cached_tokens is None else {spans.CACHED_TOKENS: prompt.cached_tokens}
        for chunk in chunks:
            yield self._part(spans.PREFILL, *chunk, attributes | cached)
        begins = [c.first_token_s for c in prompt.choices if c.first_token_s is not None]
        if begins:
            yield self._decode(prompt, min(begins), attributes)

    def _decode(self, prompt: PromptNotes, began_s: float, attributes: dict[str, Value]) -> Span:
        is_over = all(choice.finish_reason is not None for choice in prompt.choices)
        last_s = max(choice.last_token_s or 0.0 for choice in prompt.choices)
        ended_s = last_s if is_over else self._notes.closed_s
        preemptions = [when for choice in prompt.choices for when in _preemptions(choice)]
        happened = [
            Moment(name=spans.FIRST_TOKEN, when_s=began_s),
            *(Moment(name=spans.PREEMPTED, when_s=when) for when in preemptions),
            *(Moment(name=spans.REPLAYED, when_s=when) for when in prompt.replays_s),
            *self._moments.between(began_s, ended_s),
        ]
        return self._part(
            spans.DECODE,
            began_s,
            ended_s,
            attributes | {spans.PREEMPTIONS: len(preemptions)},
            sorted(happened, key=lambda moment: moment.when_s),
        )

    def _part(
        self,
        name: str,
        began_s: float,
        ended_s: float,
        attributes: Mapping[str, Value],
        moments: Sequence[Moment] = (),
    ) -> Span:
        ns = self._clock.ns
        return Span(
            name=name,
            began_ns=ns(began_s),
            ended_ns=ns(max(began_s, ended_s)),
            attributes=attributes,
            events=[
                SpanEvent(name=m.name, time_ns=ns(m.when_s), attributes=m.attributes)
                for m in moments
            ],
        )


def _chunks(choice: ChoiceNotes, admitted_s: float) -> list[tuple[float, float]]:
    """When each chunk of the prompt began and ended.

    The engine's clock is another one: its times are laid so that the first token was drawn when it
    came here, or, where none was, so that the prompt was received when it was admitted.
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


def _preemptions(choice: ChoiceNotes) -> list[float]:
    """When it gave way to others."""
    timings, told_s = choice.last_timings, choice.last_token_s
    if timings is None:
        timings, told_s = choice.first_timings, choice.first_token_s
    if timings is None or told_s is None:
        return []
    received_s = told_s - timings.finished_s
    return [received_s + after_s for after_s in timings.preempted_s]
