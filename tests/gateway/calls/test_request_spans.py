"""Spans of a running call, where no gateway is needed to tell what they must be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan

from gateway.calls.admission import Admission
from gateway.calls.call_spans import MAX_PROMPTS
from gateway.calls.choices import Choice
from gateway.calls.output_queue import OutputQueue
from gateway.calls.request_trace import RequestTrace
from gateway.calls.running_call import RunningCall
from gateway.calls.tenant_queues import CallDemand
from gateway.calls.tracing import Tracing
from gateway.cluster.events import ClusterEvents
from gateway.core.call import CallKind, GenerateCall
from gateway.core.delta import Finish, Usage
from gateway.engines.submission import Submission
from gateway.observability.metrics import GatewayMetrics
from tests.gateway.fakes import TIMINGS, expert_entry, tiny_tokenizer
from tests.harness.kept_spans import KeptSpans, times_ns
from workers.requests.request import FinishReason, Request, SamplingParams

FINISH = Finish(
    reason=FinishReason.LENGTH,
    stop_reason=None,
    usage=Usage(prompt_tokens=1, completion_tokens=2),
    timings=TIMINGS,
)


def draw(choice: Choice) -> None:
    """Its first token comes 2 s after the request's beginning, its last one at 4 s."""
    choice.first_token_s, choice.last_token_s = 102.0, 104.0
    choice.first_timings = TIMINGS


def answer(running: RunningCall) -> None:
    """All choices end after two tokens."""
    for prompt in running.prompts:
        for choice in prompt.choices:
            draw(choice)
            choice.finish = FINISH


def generation_of(num_prompts: int, n: int) -> RunningCall:
    """A call that began at 100 s, was admitted at 101 s and closed at 105 s."""
    params = SamplingParams(max_tokens=2)
    requests = [
        Request(request_id=f"cmpl-1-{index}", prompt=(1,), params=params, n=n)
        for index in range(num_prompts)
    ]
    running = RunningCall(
        GenerateCall(kind=CallKind.COMPLETION, model="tiny", n=n),
        requests,
        "cmpl-1",
        created=0,
        queue=OutputQueue(1 << 20),
        ticket=Admission(99, 999, 99).admit(
            CallDemand(num_requests=num_prompts, num_tokens=2), 100.0
        ),
        deadline_s=200.0,
        tokenizer=tiny_tokenizer(),
        eos_token_ids=(),
        metrics=GatewayMetrics("tiny", lambda: None),
        started_s=100.0,
        admitted_s=101.0,
    )
    for prompt in running.prompts:
        request = Request(request_id="r", prompt=(1,), params=params, n=n)
        sink = running.queue
        prompt.submission = Submission(request, sink, 200.0, last_worker="attention-0")
    running.queue.oldest_s, running.closed_s = 104.0, 105.0
    return running


def trace_of(running: RunningCall, error: str = "") -> RequestTrace:
    """A request that began at 100 s and ended at 105 s."""
    trace = RequestTrace("text_completion", "http", "r", {}, lambda trace: None, lambda trace: None)
    trace.running, trace.error = running, error
    trace.began_s, trace.ended_s = 100.0, 105.0
    return trace


def seconds_since(begin_ns: int, span: ReadableSpan) -> tuple[float, float]:
    """When a span began and ended."""
    began_ns, ended_ns = times_ns(span)
    return (began_ns - begin_ns) / 1e9, (ended_ns - begin_ns) / 1e9


@dataclass(frozen=True)
class Part:
    """A child of a request's span."""

    name: str
    seconds: tuple[float, float]
    events: list[str]
    attributes: Mapping[str, Any]


def parts(
    run: Callable[[RunningCall], None] = answer,
    *,
    num_prompts: int = 1,
    n: int = 1,
    error: str = "",
    cluster_events: ClusterEvents | None = None,
) -> Sequence[Part]:
    """The children of a request's span, in the order of their making; seconds since its begin."""
    running, kept = generation_of(num_prompts, n), KeptSpans()
    run(running)
    addresses = {"http": "127.0.0.1:8000"}
    events = cluster_events or ClusterEvents()
    tracing = Tracing(kept.export, "tiny", lambda: addresses, cluster_events=events)
    tracing.record(trace_of(running, error))
    *children, root = kept.spans
    began_ns, ended_ns = times_ns(root)
    assert ended_ns - began_ns == 5_000_000_000
    assert root.context is not None
    assert all(child.parent == root.context for child in children)
    return [
        Part(
            name=child.name,
            seconds=seconds_since(began_ns, child),
            events=[event.name for event in child.events],
            attributes=child.attributes or {},
        )
        for child in children
    ]


def test_parts_follow_each_other() -> None:
    assert {part.name: part.seconds for part in parts()} == {
        "expertmesh.tokenize": (0.0, 1.0),
        "expertmesh.queue": (1.0, 1.999),
        "expertmesh.prefill": (1.999, 2.0),
        "expertmesh.decode": (2.0, 4.0),
        "expertmesh.detokenize": (4.0, 5.0),
    }


def test_a_request_without_work_waited() -> None:
    found = {part.name: part.seconds for part in parts(lambda call: None, error="not_ready")}
    assert found == {"expertmesh.tokenize": (0.0, 1.0), "expertmesh.queue": (1.0, 5.0)}


def test_a_prompt_that_is_only_read_has_no_output() -> None:
    def read(running: RunningCall) -> None:
        for prompt in running.prompts:
            prompt.choices[0].finish = FINISH

    found = {part.name: part.seconds for part in parts(read)}
    assert "expertmesh.decode" not in found
    assert found["expertmesh.queue"] == (1.0, 1.001)
    assert found["expertmesh.prefill"] == (1.001, 1.002)


def test_a_broken_off_output_is_decoded_to_the_end_of_the_request() -> None:
    def break_off(running: RunningCall) -> None:
        answer(running)
        next(iter(running.prompts)).choices[0].finish = None

    decode = parts(break_off, n=2, error="internal_error")[-1]
    assert (decode.name, decode.seconds) == ("expertmesh.decode", (2.0, 5.0))


def test_events_are_in_the_order_of_time() -> None:
    cluster_events = ClusterEvents()
    for when_s, state, epoch in ((50.0, "SERVING", 3), (103.0, "LOST", 4), (200.0, "LOST", 5)):
        worker = {**expert_entry(0), "state": state}
        cluster_events.take({"placement_epoch": epoch, "workers": [worker]}, when_s)

    def replay(running: RunningCall) -> None:
        answer(running)
        for prompt in running.prompts:
            assert prompt.submission is not None
            prompt.submission.replays_s.append(103.5)

    decode = parts(replay, cluster_events=cluster_events)[-2]
    assert decode.events == ["first_token", "epoch_changed", "expert_worker_lost", "replayed"]
    assert decode.attributes["expertmesh.placement_epoch"] == 3


def test_a_large_batch_has_spans_of_its_first_prompts() -> None:
    names = [part.name for part in parts(num_prompts=MAX_PROMPTS + 1)]
    assert names.count("expertmesh.decode") == MAX_PROMPTS


def test_a_trace_that_fails_does_not_harm_its_request(caplog: pytest.LogCaptureFixture) -> None:
    async def end() -> None:
        tracing = Tracing(KeptSpans().export, "tiny", lambda: {"http": "host:none"})
        trace = tracing.begin("/v1/completions", "http", "r", ())
        assert trace is not None
        trace.end()
        await asyncio.sleep(0)

    asyncio.run(end())
    assert "could not record the trace of request r" in caplog.text


def span_id(number: int) -> bytes:
    return bytes([number]) * 24


def test_a_request_links_to_the_changes_that_went_on_meanwhile() -> None:
    kept, seen = KeptSpans(), ClusterEvents()
    before, whole, during = (
        {"name": f"expertmesh.{name}", "span_id": span_id(i).hex(), "seconds": None}
        for i, name in enumerate(("migration", "recovery", "rebalance"), 1)
    )
    seen.take({"changes": [before, whole]}, 90.0)
    seen.take({"changes": [{**before, "seconds": 9.0}, whole]}, 99.0)
    seen.take({"changes": [whole, {**during, "seconds": 0.5}]}, 103.0)
    running = generation_of(1, 1)
    answer(running)
    tracing = Tracing(kept.export, "tiny", dict, cluster_events=seen)
    tracing.record(trace_of(running))
    found = {
        link.context.trace_id.to_bytes(16, "big") + link.context.span_id.to_bytes(8, "big"): dict(
            link.attributes or {}
        )
        for link in kept.spans[-1].links
    }
    assert found == {
        span_id(2): {"expertmesh.change": "expertmesh.recovery"},
        span_id(3): {"expertmesh.change": "expertmesh.rebalance"},
    }


def test_workers_make_spans_below_the_request_and_its_decode() -> None:
    kept = KeptSpans()
    tracing = Tracing(kept.export, "tiny", dict)
    running = generation_of(MAX_PROMPTS + 1, 1)
    answer(running)
    trace = trace_of(running)
    parents = [tracing.parents(trace) for _ in running.prompts]
    assert parents[-1] is None, "it is one prompt too many"
    tracing.record(trace)
    *children, root = kept.spans
    decodes = [span for span in children if span.name == "expertmesh.decode"]
    assert root.context is not None
    for found, decode in zip(parents, decodes, strict=False):
        assert found is not None
        assert decode.context is not None
        for own, span in ((found.prefill, root), (found.decode, decode)):
            assert span.context is not None
            ids = span.context.trace_id.to_bytes(16, "big"), span.context.span_id.to_bytes(8, "big")
            assert own == b"".join(ids)


def test_the_steps_of_a_request_that_is_not_sampled_have_no_spans() -> None:
    kept = KeptSpans()
    tracing = Tracing(kept.export, "tiny", dict)
    trace = trace_of(generation_of(1, 1))
    trace.headers = {"traceparent": [f"00-{'1' * 32}-{'2' * 16}-00"]}
    assert tracing.parents(trace) is None
    tracing.record(trace)
    assert not kept.spans
