"""Traces of requests, as a collector gets them from a whole gateway."""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from msgspec.structs import replace
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from cluster.config.observability import ObservabilitySection
from cluster.core.errors import ConfigError
from gateway.calls import tracing
from gateway.calls.tracing import start_tracing
from gateway.offload import long_work
from gateway.offload.long_work import LongWork
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.fakes import (
    TIMINGS,
    attention_entry,
    expert_entry,
    other_tokenizer,
    saying,
)
from tests.gateway.http.test_disconnect import send_raw
from tests.gateway.stack import MODEL, OTHER_MODEL, WAIT_S, Stack, complete, running_stack
from tests.harness.otlp_collector import Collector, plain, running_collector
from tests.paths import ROOT

PARTS = ["tokenize", "queue", "prefill", "decode", "detokenize"]
SECRET = "hello world other words"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    """Takes the spans of all tests of this module."""
    with running_collector() as collector, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        yield collector


@pytest.fixture(scope="module")
def traced_stack(collector: Collector) -> Iterator[Stack]:
    """A gateway that traces."""
    section = ObservabilitySection(otlp_endpoint=collector.endpoint)
    with running_stack(observability=section) as stack:
        http = stack.url.rpartition("/")[2]
        stack.gateway.status.addresses = {"http": http, "grpc": stack.grpc_target}
        yield stack


@pytest.fixture
def stack(traced_stack: Stack) -> Iterator[Stack]:
    """The same, with the engine's defaults."""
    engine = traced_stack.engine
    kept = engine.script, engine.timings
    yield traced_stack
    engine.script, engine.timings = kept
    engine.step_s, engine.error, engine.num_cached_tokens = 0.0, None, 0
    engine.is_paused = False
    traced_stack.wait_for(lambda: not engine.running, "the end of all requests")


class Caller:
    """A client that has a trace of its own."""

    def __init__(self, flags: str = "01") -> None:
        self.trace_id = secrets.token_hex(16)
        self.span_id = secrets.token_hex(8)
        self.parent = f"00-{self.trace_id}-{self.span_id}-{flags}"

    def post(self, stack: Stack, path: str, **fields: Any) -> httpx.Response:
        """Send a JSON body."""
        headers = {"traceparent": self.parent, "tracestate": "vendor=1"}
        return stack.http.post(path, json=fields, headers=headers)


def names(spans: list[Span]) -> list[str]:
    """Names of all but the first, in the order in which they begin, without our prefix."""
    found = [span.name.removeprefix("expertmesh.") for span in spans[1:]]
    return sorted(found, key=PARTS.index)


def check_tree(caller: Caller, spans: list[Span]) -> None:
    """One server span below the caller's, all others below it and within its time."""
    root = spans[0]
    assert root.kind == Span.SPAN_KIND_SERVER
    assert root.parent_span_id.hex() == caller.span_id
    assert root.trace_state == "vendor=1"
    for span in spans[1:]:
        assert span.parent_span_id == root.span_id
        assert span.kind == Span.SPAN_KIND_INTERNAL
        begin, end = span.start_time_unix_nano, span.end_time_unix_nano
        assert root.start_time_unix_nano <= begin <= end <= root.end_time_unix_nano
        assert plain(span.attributes)["expertmesh.request_id"]


def part(spans: list[Span], name: str) -> tuple[Span, dict[str, Any]]:
    """A part by name, with its attributes."""
    (found,) = (span for span in spans if span.name == f"expertmesh.{name}")
    return found, plain(found.attributes)


def test_a_completion_is_one_trace(stack: Stack, collector: Collector) -> None:
    stack.engine.num_cached_tokens = 1
    caller = Caller()
    response = caller.post(
        stack,
        "/v1/completions",
        model=MODEL,
        prompt=SECRET,
        max_tokens=5,
        temperature=0.5,
        top_p=0.9,
        top_k=3,
        seed=7,
        stop=["xyz"],
        frequency_penalty=0.5,
        presence_penalty=0.25,
        n=2,
    )
    spans = collector.trace(caller.trace_id)
    check_tree(caller, spans)
    assert names(spans) == PARTS
    assert spans[0].name == f"text_completion {MODEL}"
    assert plain(spans[0].attributes) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "expertmesh",
        "gen_ai.request.model": MODEL,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.top_k": 3,
        "gen_ai.request.seed": 7,
        "gen_ai.request.stop_sequences": ["xyz"],
        "gen_ai.request.frequency_penalty": 0.5,
        "gen_ai.request.presence_penalty": 0.25,
        "gen_ai.request.choice.count": 2,
        "gen_ai.response.id": response.json()["id"],
        "gen_ai.response.model": MODEL,
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.input_tokens": response.json()["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 10,
        "server.address": "127.0.0.1",
        "server.port": int(stack.url.rpartition(":")[2]),
    }
    assert spans[0].status.code == Status.STATUS_CODE_UNSET
    common = {
        "expertmesh.request_id": response.headers["x-request-id"],
        "expertmesh.worker": "attention-0",
        "expertmesh.placement_epoch": 3,
    }
    assert part(spans, "queue")[1] == common
    assert part(spans, "prefill")[1] == common | {"expertmesh.cached_tokens": 1}
    decode, attributes = part(spans, "decode")
    assert attributes == common | {"expertmesh.preemptions": 0}
    assert [event.name for event in decode.events] == ["first_token"]
    assert collector.resource["service.name"] == "expertmesh"
    assert collector.resource["service.instance.id"] == "gateway-test"


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_is_one_trace(stack: Stack, collector: Collector, stream: bool) -> None:
    caller = Caller()
    messages = [{"role": "user", "content": SECRET}]
    fields = {"messages": messages, "max_tokens": 3, "stream": stream, "request_id": "mine"}
    assert caller.post(stack, "/v1/chat/completions", **fields).status_code == 200
    spans = collector.trace(caller.trace_id)
    check_tree(caller, spans)
    assert names(spans) == PARTS
    assert spans[0].name == f"chat {MODEL}"
    attributes = plain(spans[0].attributes)
    assert attributes["gen_ai.response.id"] == "chatcmpl-mine"
    assert attributes["gen_ai.usage.output_tokens"] == 3
    assert "gen_ai.request.temperature" not in attributes


def test_chunks_and_preemptions_are_recorded(stack: Stack, collector: Collector) -> None:
    stack.engine.timings = replace(
        TIMINGS,
        first_token_s=0.004,
        finished_s=0.005,
        prefill_s=(0.001, 0.002, 0.003),
        preempted_s=(0.005,),  # where it ended: both tokens may come at once
    )
    stack.engine.step_s = 0.05  # longer than all of these
    caller = Caller()
    caller.post(stack, "/v1/completions", prompt="x", max_tokens=2)
    spans = collector.trace(caller.trace_id)
    check_tree(caller, spans)
    assert names(spans) == [*PARTS[:2], *["prefill"] * 3, *PARTS[3:]]
    chunks = sorted(
        (span.start_time_unix_nano, span.end_time_unix_nano)
        for span in spans
        if span.name == "expertmesh.prefill"
    )
    assert [end for _, end in chunks[:2]] == [begin for begin, _ in chunks[1:]]
    assert part(spans, "queue")[0].end_time_unix_nano == chunks[0][0]
    decode, attributes = part(spans, "decode")
    assert decode.start_time_unix_nano == chunks[-1][1]
    assert [event.name for event in decode.events] == ["first_token", "preempted"]
    assert attributes["expertmesh.preemptions"] == 1


def test_embeddings_are_one_trace(stack: Stack, collector: Collector) -> None:
    """The scripted engine finds no vector: the error is in the trace, and no prompt."""
    caller = Caller()
    assert caller.post(stack, "/v1/embeddings", input=SECRET).status_code == 500
    root = collector.trace(caller.trace_id)[0]
    assert root.name == f"embeddings {MODEL}"
    assert plain(root.attributes)["gen_ai.usage.input_tokens"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_grpc_is_traced_as_http_is(stack: Stack, collector: Collector, stream: bool) -> None:
    caller = Caller()
    metadata = (("traceparent", caller.parent), ("tracestate", "vendor=1"))
    request = pb.GenerateRequest(text="x", request_id="a-b")
    request.sampling_params.max_tokens = 4
    with grpc.insecure_channel(stack.grpc_target) as channel:
        stub = InferenceStub(channel)
        if stream:
            list(stub.GenerateStream(request, metadata=metadata, timeout=WAIT_S))
        else:
            stub.Generate(request, metadata=metadata, timeout=WAIT_S)
    spans = collector.trace(caller.trace_id)
    check_tree(caller, spans)
    assert names(spans) == PARTS
    attributes = plain(spans[0].attributes)
    assert attributes["gen_ai.operation.name"] == "text_completion"
    assert attributes["server.port"] == int(stack.grpc_target.rpartition(":")[2])
    assert part(spans, "decode")[1]["expertmesh.request_id"] == "a-b"


def test_a_conversation_over_grpc_is_a_chat(stack: Stack, collector: Collector) -> None:
    caller = Caller()
    request = pb.GenerateRequest(model=MODEL)
    request.messages.messages.add(role="user", content="x")
    request.sampling_params.max_tokens = 1
    with grpc.insecure_channel(stack.grpc_target) as channel:
        metadata = (("traceparent", caller.parent),)
        InferenceStub(channel).Generate(request, metadata=metadata, timeout=WAIT_S)
    assert collector.trace(caller.trace_id)[0].name == f"chat {MODEL}"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": ""}, "invalid_value"),
        ({"prompt": "x", "temperature": -1}, "invalid_value"),
        ({"prompt": "x", "model": "other"}, "model_not_found"),
        ({"prompt": "x", "max_tokens": 10_000}, "context_length_exceeded"),
    ],
)
def test_a_refusal_is_an_error_without_parts(
    stack: Stack, collector: Collector, fields: dict[str, Any], code: str
) -> None:
    caller = Caller()
    assert caller.post(stack, "/v1/completions", **fields).status_code in (400, 404)
    (root,) = collector.trace(caller.trace_id)
    assert plain(root.attributes)["error.type"] == code
    assert root.status.code == Status.STATUS_CODE_ERROR


@pytest.mark.parametrize("stream", [False, True])
def test_an_engines_error_is_recorded(stack: Stack, collector: Collector, stream: bool) -> None:
    stack.engine.error = ("the experts are gone", "experts_unavailable")
    caller = Caller()
    caller.post(stack, "/v1/completions", prompt="x", stream=stream)
    spans = collector.trace(caller.trace_id)
    assert plain(spans[0].attributes)["error.type"] == "experts_unavailable"
    assert names(spans) == ["tokenize", "queue"]


def test_an_error_within_a_stream_is_recorded(stack: Stack, collector: Collector) -> None:
    stack.engine.step_s = 0.02
    caller = Caller()
    headers = {"traceparent": caller.parent}
    body = {"prompt": "x", "max_tokens": 400, "stream": True}
    with stack.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        lines = response.iter_lines()
        next(lines)
        stack.engine.error = ("NaN", "internal_error")
        assert "internal_error" in "".join(lines)
    spans = collector.trace(caller.trace_id)
    assert plain(spans[0].attributes)["error.type"] == "internal_error"
    assert names(spans) == PARTS[:-1]


def test_a_client_that_leaves_is_recorded(stack: Stack, collector: Collector) -> None:
    stack.engine.step_s = 0.02
    connection = send_raw(stack, "/v1/completions", {"prompt": "x", "max_tokens": 400, "n": 3})
    stack.wait_for(lambda: bool(stack.engine.running), "the request")
    connection.close()
    root = collector.answer(stack.engine.requests[-1].request_id.rpartition("-")[0])
    attributes = plain(root.attributes)
    assert attributes["error.type"] == "client_closed_request"
    assert attributes["gen_ai.response.finish_reasons"] == []
    assert not root.parent_span_id, "a trace of its own"


def test_a_grpc_client_that_leaves_is_recorded(stack: Stack, collector: Collector) -> None:
    stack.engine.step_s = 0.02
    caller = Caller()
    request = pb.GenerateRequest(text="x")
    request.sampling_params.max_tokens = 400
    with grpc.insecure_channel(stack.grpc_target) as channel:
        metadata = (("traceparent", caller.parent),)
        stub: Any = InferenceStub(channel)
        call = stub.GenerateStream(request, metadata=metadata, timeout=WAIT_S)
        next(call)
        call.cancel()
    root = collector.trace(caller.trace_id)[0]
    assert plain(root.attributes)["error.type"] == "client_closed_request"


def test_what_happens_to_the_cluster_is_in_the_traces_of_its_requests(
    stack: Stack, collector: Collector
) -> None:
    stack.engine.step_s = 0.02
    caller = Caller()
    headers = {"traceparent": caller.parent}
    body = {"prompt": "x", "max_tokens": 400, "stream": True}
    lost = {**expert_entry(1), "state": "LOST"}
    workers = [attention_entry(stack.engine), expert_entry(0)]
    with stack.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        lines = response.iter_lines()
        next(lines)
        stack.engine.is_paused = True
        stack.call(lambda: stack.controller.change(workers=[*workers, lost], placement_epoch=4))
        stack.wait_for(lambda: stack.gateway.placement_epoch == 4)
        stack.engine.is_paused, stack.engine.step_s = False, 0.0
        assert list(lines)
    decode, attributes = part(collector.trace(caller.trace_id), "decode")
    stack.call(lambda: stack.controller.change(workers=[*workers, expert_entry(1)]))
    events = {event.name: plain(event.attributes) for event in decode.events}
    assert events["epoch_changed"] == {"expertmesh.placement_epoch": 4}
    assert events["expert_worker_lost"] == {"expertmesh.worker": "expert-1"}
    assert attributes["expertmesh.placement_epoch"] == 3


@pytest.mark.parametrize(
    "headers",
    [
        [("traceparent", "00-zz-00-01")],
        [("traceparent", f"00-{'0' * 32}-{'1' * 16}-01")],
        [("traceparent", f"ff-{'1' * 32}-{'1' * 16}-01")],
        [("traceparent", f"00-{'1' * 32}-{'1' * 16}-01-more")],
        [("traceparent", f"00-{'1' * 32}-{'1' * 16}-01")] * 2,
        [("traceparent", "\xff" * 600)],
        [("tracestate", "vendor=1")],
    ],
)
def test_an_invalid_parent_counts_as_absent(
    stack: Stack, collector: Collector, headers: list[tuple[str, str]]
) -> None:
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers]
    body = {"prompt": "x", "max_tokens": 1}
    response = stack.http.post("/v1/completions", json=body, headers=raw)
    assert response.status_code == 200
    root = collector.answer(response.json()["id"])
    assert not root.parent_span_id
    assert not root.trace_state


def test_an_unsampled_trace_is_not_sent(stack: Stack, collector: Collector) -> None:
    silent, loud = Caller(flags="00"), Caller()
    for caller in (silent, loud):
        caller.post(stack, "/v1/completions", prompt="x", max_tokens=1)
    collector.trace(loud.trace_id)
    assert all(span.trace_id.hex() != silent.trace_id for span in collector.spans)


def test_probes_and_other_routes_are_not_traced(stack: Stack, collector: Collector) -> None:
    before = len(collector.spans)
    for path in ("/health", "/metrics", "/v1/models", "/v1/completions"):
        stack.http.get(path)
    Caller().post(stack, "/tokenize", prompt="x")
    caller = Caller()
    caller.post(stack, "/v1/completions", prompt="x", max_tokens=1)
    collector.trace(caller.trace_id)
    assert {span.trace_id.hex() for span in collector.spans[before:]} == {caller.trace_id}


def test_no_text_is_in_any_span(stack: Stack, collector: Collector) -> None:
    stack.engine.script = saying("the other words")
    chat, text = Caller(), Caller()
    messages = [{"role": "user", "content": SECRET}]
    chat.post(stack, "/v1/chat/completions", messages=messages, max_tokens=9)
    text.post(stack, "/v1/completions", prompt=SECRET, max_tokens=9, stream=True)
    spans = [*collector.trace(chat.trace_id), *collector.trace(text.trace_id)]
    sent = b"".join(span.SerializeToString() for span in spans)
    assert SECRET.encode() not in sent
    assert b"other words" not in sent


def test_content_is_recorded_on_request(collector: Collector) -> None:
    section = ObservabilitySection(otlp_endpoint=collector.endpoint, trace_content=True)
    with running_stack(observability=section) as stack:
        stack.engine.script = saying("the other words")
        chat, text = Caller(), Caller()
        messages = [{"role": "user", "content": SECRET}]
        chat.post(stack, "/v1/chat/completions", messages=messages, max_tokens=9)
        ids = list(stack.gateway.tokenizer.encode(SECRET, False)) if stack.gateway.tokenizer else []
        text.post(stack, "/v1/completions", prompt=ids, max_tokens=2)
        asked = [{"role": "user", "parts": [{"type": "text", "content": SECRET}]}]
        for caller in (chat, text):
            attributes = plain(collector.trace(caller.trace_id)[0].attributes)
            assert json.loads(attributes["gen_ai.input.messages"]) == asked
            (reported,) = json.loads(attributes["gen_ai.output.messages"])
            assert reported["role"] == "assistant"
            assert reported["parts"][0]["content"].startswith("the")


def test_a_trace_has_the_name_and_the_texts_of_its_model(collector: Collector) -> None:
    section = ObservabilitySection(otlp_endpoint=collector.endpoint, trace_content=True)
    more_models = {OTHER_MODEL: other_tokenizer()}
    with running_stack(observability=section, more_models=more_models) as stack:
        said = list(other_tokenizer().encode("the other words"))
        stack.others[OTHER_MODEL].engine.script = lambda request, choice: said
        caller, ids = Caller(), list(other_tokenizer().encode(SECRET))
        answer = caller.post(
            stack, "/v1/completions", prompt=ids, max_tokens=len(said), model=OTHER_MODEL
        )
        assert answer.status_code == 200, answer.text
        root = collector.trace(caller.trace_id)[0]
        assert root.name == f"text_completion {OTHER_MODEL}"
        attributes = plain(root.attributes)
        assert attributes["gen_ai.response.model"] == OTHER_MODEL
        (asked,) = json.loads(attributes["gen_ai.input.messages"])
        assert asked["parts"][0]["content"] == SECRET
        (reported,) = json.loads(attributes["gen_ai.output.messages"])
        assert reported["parts"][0]["content"] == "the other words"


def test_long_content_is_made_in_a_thread(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, found = tracing._content_attributes, []

    def note(*values: Any) -> Any:
        found.append(threading.current_thread().name)
        return make(*values)

    monkeypatch.setattr(tracing, "_content_attributes", note)
    monkeypatch.setattr(long_work, "INLINE_SIZE", 100)
    section = ObservabilitySection(otlp_endpoint=collector.endpoint, trace_content=True)
    with running_stack(observability=section) as stack:
        for length in (90, 110):
            caller = Caller()
            caller.post(stack, "/v1/completions", prompt=[7] * length, max_tokens=1)
            attributes = plain(collector.trace(caller.trace_id)[0].attributes)
            assert json.loads(attributes["gen_ai.input.messages"])
    short, long = found
    assert not short.startswith("long-work")
    assert long.startswith("long-work")


def test_a_dead_collector_changes_nothing() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    section = ObservabilitySection(otlp_endpoint=f"http://127.0.0.1:{port}")
    with running_stack(observability=section) as stack:
        assert complete(stack, prompt="x", max_tokens=3)["usage"]["completion_tokens"] == 3


def test_off_it_imports_nothing_and_makes_nothing() -> None:
    code = (
        "import sys, gateway.http.api, gateway.grpc.server\n"
        "from cluster.config.observability import ObservabilitySection\n"
        "from gateway.calls.tracing import start_tracing\n"
        "assert start_tracing(ObservabilitySection(), 'g', 'm', dict, None) is None\n"
        "names = ('opentelemetry.sdk', 'opentelemetry.exporter')\n"
        "print([name for name in names if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240
    )
    assert done.stdout.strip() == "[]", done.stderr


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    section = ObservabilitySection(otlp_endpoint="http://127.0.0.1:4317")
    with pytest.raises(ConfigError, match=r"otlp_endpoint .* needs the extra otel: pip install"):
        start_tracing(section, "gateway", MODEL, dict, LongWork())
