"""Traces requests: collects times while a request runs, and makes spans after its end.

``HttpMiddleware`` and ``GrpcCall`` begin and end a ``RequestTrace``; ``Gateway`` adds the call's
fields and its ``RunningCall``. Only the span of the request is made before its end: when the first
prompt is sent to an engine, since workers make child spans for their steps. Without tracing, the
cost per request is one check.

    chat tiny                    the whole request
      expertmesh.tokenize        tokenization of the prompts
      expertmesh.queue           each prompt, until its first rows were sent to the experts
      expertmesh.prefill         each chunk of a prompt
      expertmesh.step            each step with rows of a prompt, one span per worker
      expertmesh.decode          each prompt, from its first token to its last token
        expertmesh.step          the 1st, 2nd, 4th, 8th, .. decode step
      expertmesh.detokenize      from the last output of the engines to the end

The request's span links to the traces of cluster changes during the request.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.config.observability import ObservabilitySection
from cluster.tracing import names
from cluster.tracing.exporter import (
    Span,
    SpanId,
    SpanKind,
    TraceExport,
    add_link,
    load_exporter,
    parent_context,
    set_error,
    set_span_in_context,
)
from gateway.calls.call_spans import MAX_PROMPTS, Attributes, CallSpans
from gateway.calls.request_trace import TRACE, Port, RequestTrace
from gateway.calls.running_call import RunningCall
from gateway.cluster.events import ClusterEvents
from gateway.core.call import CallKind, GenerateCall
from gateway.offload.long_work import LongWork
from workers.requests.traced import StepParents

logger = logging.getLogger(__name__)

OPERATIONS: Mapping[str, str] = {
    "/v1/completions": names.TEXT_COMPLETION,
    "/v1/chat/completions": names.CHAT,
    "/v1/responses": names.CHAT,
    "/v1/messages": names.CHAT,
    "/v1/embeddings": names.EMBEDDINGS,
    "Generate": names.TEXT_COMPLETION,
    "GenerateStream": names.TEXT_COMPLETION,
    "Embed": names.EMBEDDINGS,
}
"""Operation name of each traced HTTP path and gRPC method. gRPC conversations are ``chat``, too."""
_HEADERS = ("traceparent", "tracestate")
_REQUESTED = {
    names.MAX_TOKENS: "max_tokens",
    names.TEMPERATURE: "temperature",
    names.TOP_P: "top_p",
    names.TOP_K: "top_k",
    names.SEED: "seed",
    names.FREQUENCY_PENALTY: "frequency_penalty",
    names.PRESENCE_PENALTY: "presence_penalty",
    names.CHOICE_COUNT: "n",
}
"""Span attribute -> field of ``GenerateCall`` that has the value of the attribute."""


@dataclass(frozen=True, slots=True)
class Tracing:
    """Traces the requests of one gateway replica with OpenTelemetry spans."""

    export: TraceExport
    """Exporter of the spans."""
    model: str
    """Name of the default model."""
    addresses: Callable[[], Mapping[str, Any]]
    """Function that returns ``host:port`` by port name, ``http`` and ``grpc``, once known."""
    has_content: bool = False
    """Whether the spans have the texts of prompts and outputs."""
    cluster_events: ClusterEvents = field(default_factory=ClusterEvents)
    long_work: LongWork = field(default_factory=LongWork)
    """Thread that detokenizes long prompts and outputs."""
    _recorders: set[asyncio.Task[None]] = field(default_factory=set)
    """Tasks that record finished requests with their prompts and outputs."""

    def begin(
        self, name: str, port: Port, request_id: str, headers: Iterable[tuple[str, str | bytes]]
    ) -> RequestTrace | None:
        """Begin the trace of the request that the current task serves, and return the trace.

        ``name`` is the HTTP path or gRPC method; None is returned if it is not traced. ``headers``
        may name the parent span.
        """
        operation = OPERATIONS.get(name)
        if operation is None:
            return None
        parent: dict[str, list[str]] = {}
        for header, value in headers:
            if header in _HEADERS and isinstance(value, str):
                parent.setdefault(header, []).append(value)
        trace = RequestTrace(
            operation, port, request_id, parent, on_prompt=self._parents, on_end=self._record
        )
        TRACE.set(trace)
        return trace

    def see(self, snapshot: Mapping[str, Any]) -> None:
        self.cluster_events.take(snapshot, time.monotonic())

    def parents(self, trace: RequestTrace) -> StepParents | None:
        """Return the parent spans for the engine's steps with the request's next prompt.

        None if the trace is not sampled, or if the request has too many prompts.
        """
        trace.span = trace.span or self._start(trace)
        if not trace.span.is_recording() or len(trace.decodes) == MAX_PROMPTS:
            return None
        decode = self.export.new_id(trace.span)
        trace.decodes.append(decode)
        request = SpanId.of(trace.span)
        return StepParents(prefill=request.to_bytes(), decode=decode.to_bytes())

    def record(self, trace: RequestTrace, content: Attributes | None = None) -> None:
        """Complete the span of a finished request and make its child spans.

        ``content`` are the attributes with the prompts and outputs of the request.
        """
        root, running = trace.span or self._start(trace), trace.running
        if not root.is_recording():
            return  # not sampled
        if running is not None:
            root.set_attributes(_response_attributes(running, trace.model, trace.response_id))
            root.set_attributes(content or {})
            for change in self.cluster_events.changes(running.admitted_s, trace.ended_s):
                add_link(root, change.span_id, {names.CHANGE: change.name})
        set_error(root, trace.error)
        if running is not None:
            parent = set_span_in_context(root)
            spans = CallSpans(self.export, self.cluster_events, parent, trace.day_ns)
            spans.record(trace, running)
        root.end(trace.day_ns + round(trace.ended_s * 1e9))

    def _start(self, trace: RequestTrace) -> Span:
        operation = _operation(trace)
        attributes = {
            names.OPERATION_NAME: operation,
            names.PROVIDER_NAME: names.PROVIDER,
            **_server_attributes(str(self.addresses().get(trace.port, ""))),
            **_request_attributes(trace.fields),
        }
        return self.export.tracer.start_span(
            f"{operation} {trace.model or self.model}",
            parent_context(trace.headers),
            SpanKind.SERVER,
            attributes,
            start_time=trace.day_ns + round(trace.began_s * 1e9),
        )

    def _parents(self, trace: RequestTrace) -> StepParents | None:
        """Return the parent spans as ``parents`` does, but log any exception and return None."""
        try:
            return self.parents(trace)
        except Exception:
            logger.exception("could not begin the step spans of request %s", trace.request_id)
            return None

    def _record(self, trace: RequestTrace) -> None:
        """Make the spans of a finished request as ``record`` does, but log any exception."""
        if trace.running is not None and self.has_content:
            recorder = asyncio.create_task(self._record_with_content(trace, trace.running))
            self._recorders.add(recorder)
            recorder.add_done_callback(self._recorders.discard)
            return
        with _logging_errors(trace):
            self.record(trace)

    async def _record_with_content(self, trace: RequestTrace, running: RunningCall) -> None:
        with _logging_errors(trace):
            trace.span = trace.span or self._start(trace)
            content: Attributes = {}
            if trace.span.is_recording():
                num_tokens = running.usage.prompt_tokens + running.usage.completion_tokens
                content = await self.long_work.run(
                    num_tokens, _content_attributes, trace.fields, running
                )
            self.record(trace, content)


def start_tracing(
    section: ObservabilitySection,
    instance: str,
    model: str,
    addresses: Callable[[], Mapping[str, Any]],
    long_work: LongWork,
) -> Tracing | None:
    """Start tracing the requests of a gateway replica; return None without an OTLP endpoint.

    ``instance`` is the name of the replica. Raises ``ConfigError`` if packages are missing.
    """
    if section.otlp_endpoint is None:
        return None
    export = load_exporter(section.otlp_endpoint)(instance)
    return Tracing(export, model, addresses, section.trace_content, long_work=long_work)


@contextlib.contextmanager
def _logging_errors(trace: RequestTrace) -> Iterator[None]:
    """Context manager that logs any exception while the spans of a request are made."""
    try:
        yield
    except Exception:
        logger.exception("could not record the trace of request %s", trace.request_id)


def _operation(trace: RequestTrace) -> str:
    if trace.fields is None:
        return trace.operation
    return names.CHAT if trace.fields.kind is CallKind.CHAT else names.TEXT_COMPLETION


def _server_attributes(address: str) -> Attributes:
    host, _, port = address.rpartition(":")
    return {names.SERVER_ADDRESS: host, names.SERVER_PORT: int(port)} if host else {}


def _request_attributes(fields: GenerateCall | None) -> Attributes:
    if fields is None:
        return {}
    values = {name: getattr(fields, field) for name, field in _REQUESTED.items()}
    values[names.STOP_SEQUENCES] = fields.stop or None
    return {name: value for name, value in values.items() if value is not None}


def _response_attributes(running: RunningCall, model: str, response_id: str | None) -> Attributes:
    usage = running.usage
    finishes = [choice.finish for prompt in running.prompts for choice in prompt.choices]
    return {
        names.REQUEST_MODEL: running.call.model,
        names.RESPONSE_ID: response_id or running.call_id,
        names.RESPONSE_MODEL: model,
        names.FINISH_REASONS: [finish.reason.value for finish in finishes if finish is not None],
        names.INPUT_TOKENS: usage.prompt_tokens,
        names.OUTPUT_TOKENS: usage.completion_tokens,
    }


def _content_attributes(fields: GenerateCall | None, running: RunningCall) -> Attributes:
    def decode(ids: Sequence[int]) -> str:
        if running.tokenizer is None:
            return " ".join(map(str, ids))
        return running.tokenizer.decode(ids, False)

    if fields is not None and fields.chat is not None:
        asked = [
            _message(str(message.get("role")), str(message.get("content") or ""))
            for message in fields.chat.messages
        ]
    else:
        asked = [
            _message("user", decode(request.prompt) if text is None else text)
            for index, request in enumerate(running.requests)
            for text in (running.call.prompt_text(index),)
        ]
    answered = [
        _message("assistant", decode(choice.token_ids))
        | {"finish_reason": choice.finish.reason.value if choice.finish else "error"}
        for prompt in running.prompts
        for choice in prompt.choices
    ]
    return {names.INPUT_MESSAGES: _json(asked), names.OUTPUT_MESSAGES: _json(answered)}


def _message(role: str, text: str) -> dict[str, object]:
    return {"role": role, "parts": [{"type": "text", "content": text}]}


def _json(content: object) -> str:
    return json.dumps(content, ensure_ascii=False)
