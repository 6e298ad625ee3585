"""The gRPC service: the same requests, the same answers, rich errors."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from prometheus_client.parser import text_string_to_metric_families

from cluster.config.gateway import GatewaySection
from gateway.calls.readiness import shutdown_error
from gateway.core.tuning import GatewayTuning
from gateway.grpc.api import SERVICE
from gateway.grpc.messages import read_message
from gateway.grpc.server import server_options
from gateway.offload.long_work import INLINE_SIZE
from protos import inference_pb2 as pb
from protos import types_pb2
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.fakes import BACKEND, EOS, EOS_ID, MAX_MODEL_LEN, VOCAB_SIZE, saying
from tests.gateway.stack import MODEL, WAIT_S, Stack, complete, post, running_stack

HELLO = BACKEND.encode("hello world").ids


@pytest.fixture
def stub(stack: Stack) -> Iterator[InferenceStub]:
    """A client of the shared gateway."""
    with grpc.insecure_channel(stack.grpc_target) as channel:
        yield InferenceStub(channel)


def request_of(**fields: Any) -> pb.GenerateRequest:
    """A message from plain data."""
    return json_format.ParseDict(fields, pb.GenerateRequest())


def failure(call: Any) -> tuple[grpc.StatusCode, str, dict[str, Any]]:
    """Code, message and details of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    raw = dict(error.trailing_metadata())["grpc-status-details-bin"]
    status = status_pb2.Status.FromString(raw)
    assert status.code == error.code().value[0]
    details: dict[str, Any] = {}
    for packed in status.details:
        for kind in (
            error_details_pb2.ErrorInfo,
            error_details_pb2.BadRequest,
            error_details_pb2.RetryInfo,
            error_details_pb2.RequestInfo,
        ):
            detail: Any = kind()
            if packed.Unpack(detail):
                details[kind.DESCRIPTOR.name] = detail
    return error.code(), error.details(), details


SAMPLING = {"max_tokens": 6, "seed": "3"}


@pytest.mark.parametrize(
    ("message", "http"),
    [
        ({"text": "hello", "sampling_params": SAMPLING}, {"prompt": "hello"}),
        ({"token_ids": {"ids": HELLO}, "sampling_params": SAMPLING}, {"prompt": HELLO}),
        (
            {
                "text": "hello",
                "sampling_params": {**SAMPLING, "n": 2},
                "output_options": {"logprobs": 2, "echo": True},
            },
            {"prompt": "hello", "n": 2, "logprobs": 2, "echo": True},
        ),
        (
            {"text": "hello", "sampling_params": {**SAMPLING, "stop": ["o "]}},
            {"prompt": "hello", "stop": "o "},
        ),
    ],
)
def test_both_codecs_and_streams_give_the_same(
    stack: Stack, stub: InferenceStub, message: dict[str, Any], http: dict[str, Any]
) -> None:
    over_http = complete(stack, **http, max_tokens=6, seed=3, return_token_ids=True)
    answer = stub.Generate(request_of(**message))
    chunks = list(stub.GenerateStream(request_of(**message)))
    assert answer.usage.total_tokens == over_http["usage"]["total_tokens"]
    for expected in over_http["choices"]:
        index = expected["index"]
        choice = answer.choices[index]
        parts = [chunk for chunk in chunks if chunk.choice_index == index]
        assert choice.text == expected["text"] == "".join(part.text for part in parts)
        assert list(choice.token_ids) == expected["token_ids"]
        assert [i for part in parts for i in part.token_ids] == expected["token_ids"]
        reason = types_pb2.FinishReason.Name(choice.finish_info.reason)
        assert reason == f"FINISH_REASON_{expected['finish_reason'].upper()}"
        assert choice.finish_info.stop == (expected["stop_reason"] or "")
        assert parts[-1].finish_info == choice.finish_info
        assert not any(part.HasField("finish_info") for part in parts[:-1])
        assert [e for part in parts for e in part.logprobs] == list(choice.logprobs)
        if expected["logprobs"]:
            values = [e.logprob if e.HasField("logprob") else None for e in choice.logprobs]
            assert values == expected["logprobs"]["token_logprobs"]
            offsets = [entry.text_offset for entry in choice.logprobs]
            assert offsets == expected["logprobs"]["text_offset"]
            tops = [{t.token: t.logprob for t in e.top_logprobs} or None for e in choice.logprobs]
            assert tops == expected["logprobs"]["top_logprobs"]


def test_a_conversation(stack: Stack, stub: InferenceStub) -> None:
    messages = [{"role": "user", "content": "hi"}]
    over_http = post(stack, "/v1/chat/completions", messages=messages, seed=3, max_tokens=5).json()
    chat = {"messages": messages}
    answer = stub.Generate(
        request_of(messages=chat, sampling_params={"seed": "3", "max_tokens": 5})
    )
    assert answer.choices[0].text == over_http["choices"][0]["message"]["content"]
    assert stack.engine.requests[0].prompt == stack.engine.requests[1].prompt


def test_metadata_ids_and_usage(stack: Stack, stub: InferenceStub) -> None:
    call = stub.GenerateStream(
        request_of(
            text="hello", sampling_params=SAMPLING, output_options={"return_token_ids": True}
        ),
        metadata=(("x-request-id", "mine"),),
    )
    initial = dict(call.initial_metadata())
    assert initial["x-request-id"] == "mine"
    assert initial["x-placement-epoch"] == "3"
    chunks = list(call)
    assert {chunk.request_id for chunk in chunks} == {"mine"}
    assert list(chunks[0].prompt_token_ids) == BACKEND.encode("hello").ids
    assert chunks[0].HasField("cached_tokens")
    assert not any(chunk.prompt_token_ids for chunk in chunks[1:])
    trailing = dict(call.trailing_metadata())
    assert (trailing["x-prompt-tokens"], trailing["x-completion-tokens"]) == ("1", "6")
    assert chunks[-1].finish_info.timings.finished_s > 0
    named = stub.Generate(request_of(text="a", request_id="also-mine", sampling_params=SAMPLING))
    assert named.request_id == "also-mine"


def test_token_ids_only(stack: Stack, stub: InferenceStub) -> None:
    stack.engine.script = saying("hello world")
    answer = stub.Generate(
        request_of(
            text="x",
            sampling_params={"max_tokens": 50},
            output_options={"token_ids_only": True},
        )
    )
    assert answer.choices[0].text == ""
    assert list(answer.choices[0].token_ids) == [*HELLO, EOS_ID]


def test_tokenize_and_back(stack: Stack, stub: InferenceStub) -> None:
    answer = stub.Tokenize(pb.TokenizeRequest(prompt="hello", return_token_strs=True))
    assert list(answer.tokens) == BACKEND.encode("hello").ids
    assert list(answer.token_strs) == ["hello"]
    assert (answer.count, answer.max_model_len) == (1, MAX_MODEL_LEN)
    chat = types_pb2.ChatMessages(messages=[types_pb2.ChatMessage(role="user", content="hi")])
    rendered = stub.Tokenize(pb.TokenizeRequest(messages=chat))
    assert list(rendered.tokens) == BACKEND.encode(f"<|user|>hi{EOS}\n<|assistant|>").ids
    assert stub.Detokenize(pb.DetokenizeRequest(tokens=HELLO)).prompt == "hello world"


def test_models(stack: Stack, stub: InferenceStub) -> None:
    info = stub.GetModelInfo(pb.GetModelInfoRequest())
    assert (info.id, info.max_model_len, info.vocab_size) == (MODEL, MAX_MODEL_LEN, VOCAB_SIZE)
    assert list(info.eos_token_ids) == [EOS_ID]
    assert info.has_tokenizer
    assert info.has_chat_template
    assert list(stub.ListModels(pb.ListModelsRequest()).models) == [info]
    unknown = pb.GetModelInfoRequest(model="other")
    assert failure(lambda: stub.GetModelInfo(unknown))[0] is grpc.StatusCode.NOT_FOUND


CODES = grpc.StatusCode


@pytest.mark.parametrize(
    ("fields", "code", "reason", "field"),
    [
        ({}, CODES.INVALID_ARGUMENT, "missing_required_parameter", "input"),
        ({"text": ""}, CODES.INVALID_ARGUMENT, "invalid_value", "text"),
        ({"token_ids": {}}, CODES.INVALID_ARGUMENT, "invalid_value", "token_ids"),
        ({"token_ids": {"ids": [9999]}}, CODES.INVALID_ARGUMENT, "invalid_value", "token_ids"),
        ({"text": "x" * 9999}, CODES.INVALID_ARGUMENT, "context_length_exceeded", "text"),
        ({"text": "x", "model": "other"}, CODES.NOT_FOUND, "model_not_found", "model"),
        ({"embeddings": {}}, CODES.INVALID_ARGUMENT, "invalid_value", "embeddings"),
        (
            {"embeddings": {"shape": [1, 8], "data": bytes(28)}},
            CODES.INVALID_ARGUMENT,
            "invalid_value",
            "embeddings",
        ),
        (
            {"embeddings": {"shape": [1, 8], "data": b"\x00\x00\xc0\x7f" * 8}},
            CODES.INVALID_ARGUMENT,
            "invalid_value",
            "embeddings",
        ),
        (
            {"embeddings": {"shape": [2, 4], "data": bytes(32)}},
            CODES.INVALID_ARGUMENT,
            "invalid_value",
            "embeddings",
        ),
        (
            {"embeddings": {"shape": [2**31, 2**31], "data": bytes(32)}},
            CODES.INVALID_ARGUMENT,
            "invalid_value",
            "embeddings",
        ),
        (
            {
                "embeddings": {"shape": [1, 8], "data": bytes(32)},
                "output_options": {"echo": True},
            },
            CODES.UNIMPLEMENTED,
            "unsupported_parameter",
            "echo",
        ),
        ({"messages": {}}, CODES.INVALID_ARGUMENT, "invalid_value", "messages"),
        (
            {"messages": {"chat_template_kwargs": {"x": math.inf}}},
            CODES.INVALID_ARGUMENT,
            "invalid_value",
            "chat_template_kwargs",
        ),
        (
            {"messages": {"chat_template_kwargs": {"x": [math.nan]}}},
            CODES.INVALID_ARGUMENT,
            "invalid_value",
            "chat_template_kwargs",
        ),
    ],
)
def test_bad_requests(
    stack: Stack,
    stub: InferenceStub,
    fields: dict[str, Any],
    code: grpc.StatusCode,
    reason: str,
    field: str,
) -> None:
    for call in (stub.Generate, lambda message: list(stub.GenerateStream(message))):
        got, message, details = failure(lambda call=call: call(request_of(**fields)))
        assert got is code
        assert message
        assert details["ErrorInfo"].reason == reason
        assert details["ErrorInfo"].domain == "expertmesh"
        assert details["BadRequest"].field_violations[0].field == field
        assert details["RequestInfo"].request_id
    assert not stack.engine.requests


@pytest.mark.parametrize(
    ("sampling", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": MAX_MODEL_LEN}, "max_tokens"),
        ({"n": 1_000_000}, "n"),
        ({"temperature": "NaN"}, "temperature"),
        ({"temperature": "Infinity"}, "temperature"),
        ({"stop": ["x"] * 1000}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logit_bias": {"-1": 1.0}}, "logit_bias"),
        ({"logit_bias": {"1": "NaN"}}, "logit_bias"),
    ],
)
def test_bad_sampling(stub: InferenceStub, sampling: dict[str, Any], field: str) -> None:
    message = request_of(text="x", sampling_params=sampling)
    code, _, details = failure(lambda: stub.Generate(message))
    assert code is CODES.INVALID_ARGUMENT
    assert details["BadRequest"].field_violations[0].field == field


@pytest.mark.parametrize(
    "method",
    ["Generate", "GenerateStream", "Tokenize", "Detokenize", "GetModelInfo", "Score", "Inspect"],
)
def test_messages_that_cannot_be_decoded(stack: Stack, method: str) -> None:
    with grpc.insecure_channel(stack.grpc_target) as channel:
        call: Any = channel.unary_stream(f"/expertmesh.v1.Inference/{method}", bytes, bytes)
        got, message, details = failure(lambda: list(call(b"\xff" * 99)))
    assert got is CODES.INVALID_ARGUMENT
    assert details["ErrorInfo"].reason
    assert "decoded" in message
    assert not stack.engine.requests


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"text": ""}, "text must not be empty"),
        ({"token_ids": {}}, "token_ids must not be empty"),
        ({"messages": {}}, "messages must not be empty"),
    ],
)
def test_an_empty_input_is_called_by_its_field(
    stub: InferenceStub, fields: dict[str, Any], expected: str
) -> None:
    _, message, details = failure(lambda: stub.Generate(request_of(**fields)))
    assert message == expected
    assert details["BadRequest"].field_violations[0].description == expected


def test_large_messages(stub: InferenceStub) -> None:
    code, _, details = failure(lambda: stub.Generate(pb.GenerateRequest(text="x" * 10_000_000)))
    assert (code, details["ErrorInfo"].reason) == (
        CODES.INVALID_ARGUMENT,
        "context_length_exceeded",
    )
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(pb.GenerateRequest(text="x" * 17_000_000))
    too_large: Any = caught.value
    assert too_large.code() is CODES.RESOURCE_EXHAUSTED


class Watched:
    """A request message that notes which long texts the event loop's thread reads."""

    def __init__(self, message: Any, found: list[str]) -> None:
        self._message = message
        self._found = found

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._message, name)
        texts = [text for _, text in value()] if name == "ListFields" else [value]
        is_long = any(isinstance(text, str) and len(text) > INLINE_SIZE for text in texts)
        if is_long and not threading.current_thread().name.startswith("long-work"):
            self._found.append(name)
        return value


@pytest.mark.parametrize("method", [m.name for m in SERVICE.methods if m.name != "GenerateStream"])
def test_the_event_loop_reads_no_long_text(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """16 MiB of a text take 20 ms to decode, with the interpreter lock held."""
    found: list[str] = []
    codes = {}

    def watched(kind: Any, data: bytes) -> Any:
        return Watched(read_message(kind, data), found)

    monkeypatch.setattr("gateway.grpc.handlers.read_message", watched)
    kind = SERVICE.methods_by_name[method].input_type
    texts = [one.name for one in kind.fields if one.type == one.TYPE_STRING]
    with grpc.insecure_channel(stack.grpc_target) as channel:
        path = f"/{SERVICE.full_name}/{method}"
        for name in texts:
            text = "a" * (INLINE_SIZE + 1)
            is_list = kind.fields_by_name[name].is_repeated
            data = GetMessageClass(kind)(**{name: [text] if is_list else text}).SerializeToString()
            call = channel.unary_stream(path, request_serializer=None, response_deserializer=None)
            try:
                list(call(data, timeout=WAIT_S))
                codes[name] = "OK"
            except grpc.RpcError as err:
                codes[name] = err.code().name
    assert not found
    assert set(codes.values()) <= {"OK", "INVALID_ARGUMENT", "NOT_FOUND"}, codes


def test_errors_of_engines(stack: Stack, stub: InferenceStub) -> None:
    stack.engine.error = ("no room", "queue_full")
    code, _, details = failure(lambda: stub.Generate(request_of(text="x")))
    assert code is CODES.RESOURCE_EXHAUSTED
    assert 1 <= details["RetryInfo"].retry_delay.seconds <= 60


def test_a_deadline_ends_the_work(stack: Stack, stub: InferenceStub) -> None:
    stack.engine.is_paused = True
    for limit_s in (0.2, 1.0, 5.0, 25.0):  # a busy machine may need more to reach the engine
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(request_of(text="x"), timeout=limit_s)
        late: Any = caught.value
        assert late.code() is CODES.DEADLINE_EXCEEDED
        if stack.engine.requests:
            break
    stack.wait_for(lambda: bool(stack.engine.aborts), "the abort")
    assert stack.engine.requests[0].deadline_ms <= 1000 * limit_s


def test_a_deadline_is_not_a_client_that_left(stack: Stack, stub: InferenceStub) -> None:
    """Whether its end arrives before the deadline has passed here or after."""
    metrics = stack.gateway.metrics

    def counts() -> dict[str, float]:
        families = text_string_to_metric_families(metrics.render().decode())
        samples = [sample for family in families for sample in family.samples]
        calls = [s for s in samples if s.name == "expertmesh:grpc_requests_total"]
        codes = {sample.labels["code"] for sample in calls}
        found = {code: sum(s.value for s in calls if s.labels["code"] == code) for code in codes}
        (left,) = [s for s in samples if s.name == "expertmesh:client_disconnects_total"]
        return {**found, "disconnects": left.value}

    before = counts()
    ways: Any = (stub.Generate, stub.GenerateStream)
    stack.engine.is_paused = True
    for limit_s in (0.2, 0.2, 0.2, 1.0, 5.0, 25.0):  # a busy machine may need more to get there
        for call in ways:
            with pytest.raises(grpc.RpcError) as caught:
                list(call(request_of(text="x"), timeout=limit_s))
            late: Any = caught.value
            assert late.code() is CODES.DEADLINE_EXCEEDED
        if limit_s >= 1.0 and len(stack.engine.requests) >= 2:
            break
    stack.wait_no_requests()
    stack.wait_for(lambda: counts() != before, "the counts")
    assert counts() == before | {"DEADLINE_EXCEEDED": counts()["DEADLINE_EXCEEDED"]}


@pytest.mark.parametrize("unary", [True, False])
def test_a_cancel_aborts_at_once(stack: Stack, stub: InferenceStub, unary: bool) -> None:
    stack.engine.step_s = 0.02
    message = request_of(text="x", sampling_params={"max_tokens": 400})
    if unary:
        call: Any = stub.Generate.future(message)
        stack.wait_for(lambda: bool(stack.engine.running), "the request")
    else:
        call = stub.GenerateStream(message)
        next(call)
    call.cancel()
    stack.wait_for(lambda: not stack.engine.running, "the abort")
    assert stack.engine.aborts == [(stack.engine.requests[0].request_id, ())]


def test_a_shutdown_ends_every_call_with_its_status(stack: Stack, stub: InferenceStub) -> None:
    """All raise the same error, and the end of one does not disturb the others."""

    def num_counted() -> float:
        (family,) = stack.gateway.metrics.grpc_requests.collect()
        wanted = {"method": "Generate", "code": "UNAVAILABLE"}
        counts = (s for s in family.samples if s.name.endswith("_total"))
        return sum(s.value for s in counts if wanted.items() <= s.labels.items())

    before = num_counted()
    stack.engine.is_paused = True
    calls = [stub.Generate.future(request_of(text="x"), timeout=WAIT_S) for _ in range(8)]
    stack.wait_for(lambda: len(stack.engine.running) == len(calls), "the requests")
    stack.call(lambda: stack.gateway.running.fail(shutdown_error()))
    assert {call.code() for call in calls} == {CODES.UNAVAILABLE}
    stack.wait_for(lambda: num_counted() >= before + len(calls), "the counts")


def test_health_and_reflection(stack: Stack) -> None:
    with grpc.insecure_channel(stack.grpc_target) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "expertmesh.v1.Inference"):
            request = health_pb2.HealthCheckRequest(service=name)
            serving = health_pb2.HealthCheckResponse.SERVING
            assert health.Check(request, timeout=WAIT_S).status == serving
            assert next(iter(health.Watch(request, timeout=WAIT_S))).status == serving
        reflected = reflection_pb2_grpc.ServerReflectionStub(channel)
        ask = reflection_pb2.ServerReflectionRequest(list_services="")
        answer = next(iter(reflected.ServerReflectionInfo(iter([ask]), timeout=WAIT_S)))
        names = {service.name for service in answer.list_services_response.service}
        symbols = ("GenerateRequest", "TopLogprob", "Inference", "Admin", "Engine")
        asks = [
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=f"expertmesh.v1.{name}")
            for name in symbols
        ]
        answers = reflected.ServerReflectionInfo(iter(asks), timeout=WAIT_S)
        found = [answer.WhichOneof("message_response") for answer in answers]
    assert {"expertmesh.v1.Inference", "grpc.health.v1.Health"} <= names
    assert found == ["file_descriptor_response"] * 3 + ["error_response"] * 2


def test_health_follows_readiness() -> None:
    with running_stack(serving=False) as stack, grpc.insecure_channel(stack.grpc_target) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        code, _, details = failure(lambda: InferenceStub(channel).Generate(request_of(text="x")))
        assert code is CODES.UNAVAILABLE
        assert details["RetryInfo"].retry_delay.seconds >= 1
        stack.serve()
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        stack.call(lambda: stack.controller.change(late_workers=["expert-1"]))
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        stack.call(lambda: stack.controller.change(late_workers=[]))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()


def test_keys_guard_all_but_health() -> None:
    with (
        running_stack(GatewaySection(api_keys=("secret",))) as stack,
        grpc.insecure_channel(stack.grpc_target) as channel,
    ):
        stub = InferenceStub(channel)
        code, _, details = failure(lambda: stub.Generate(request_of(text="x")))
        assert code is CODES.UNAUTHENTICATED
        assert details["ErrorInfo"].reason == "invalid_api_key"
        stream = failure(lambda: list(stub.GenerateStream(request_of(text="x"))))
        assert stream[0] is CODES.UNAUTHENTICATED
        key = (("authorization", "Bearer secret"),)
        assert stub.Generate(request_of(text="x"), metadata=key).choices
        health = health_pb2_grpc.HealthStub(channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S).status
        reflected = reflection_pb2_grpc.ServerReflectionStub(channel)
        asks = iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        refused = failure(lambda: list(reflected.ServerReflectionInfo(asks, timeout=WAIT_S)))
        assert refused[0] is CODES.UNAUTHENTICATED


def test_what_a_key_would_open_is_refused_by_name_and_counted() -> None:
    with (
        running_stack(GatewaySection(api_keys=("secret",))) as stack,
        grpc.insecure_channel(stack.grpc_target) as channel,
    ):
        call = InferenceStub(channel).GenerateStream(
            request_of(text="x"), metadata=(("x-request-id", "mine"),)
        )
        _, _, details = failure(lambda: list(call))
        assert details["RequestInfo"].request_id == "mine"
        assert dict(call.initial_metadata())["x-request-id"] == "mine"
        for name in ("a", "b"):  # as HTTP asks for a key at unknown paths
            unknown: Any = channel.unary_unary(f"/secret.v1.Things/{name}", bytes, bytes)
            code, _, details = failure(lambda unknown=unknown: unknown(b""))
            assert code is CODES.UNAUTHENTICATED
            assert details["RequestInfo"].request_id
        key = (("authorization", "Bearer secret"),)
        code, message, details = failure(lambda: unknown(b"", metadata=key))
        assert code is CODES.UNIMPLEMENTED
        assert "'/secret.v1.Things/b'" in message
        assert details["ErrorInfo"].reason == "not_found"

        def metrics() -> str:
            return stack.http.get("/metrics", headers={"authorization": "Bearer secret"}).text

        labels = 'code="UNAUTHENTICATED",method="{}",model_name="tiny",service="{}"'
        counted = labels.format("GenerateStream", "expertmesh.v1.Inference")
        others = labels.format("other", "other")
        last = others.replace("UNAUTHENTICATED", "UNIMPLEMENTED")
        # a call is counted once its answer is on its way
        stack.wait_for(lambda: f"grpc_requests_total{{{last}}} 1.0" in metrics(), "the last count")
        found = metrics()
    assert f"grpc_requests_total{{{counted}}} 1.0" in found
    assert f"grpc_requests_total{{{others}}} 2.0" in found
    assert "secret" not in found


def test_an_old_connection_is_renewed_and_breaks_no_call() -> None:
    """The client gets GOAWAY and connects again; what runs on the old connection runs on."""
    tuning = GatewayTuning(connection_age_s=0.1)
    states: list[grpc.ChannelConnectivity] = []
    is_renewed = threading.Event()

    def follow(state: grpc.ChannelConnectivity) -> None:
        states.append(state)
        if states.count(grpc.ChannelConnectivity.READY) >= 2:
            is_renewed.set()

    with (
        running_stack(tuning=tuning) as stack,
        grpc.insecure_channel(stack.grpc_target) as channel,
    ):
        channel.subscribe(follow, try_to_connect=True)
        stack.engine.step_s = 0.02
        stub = InferenceStub(channel)
        call = request_of(text="x", sampling_params={"max_tokens": 50})
        while not is_renewed.is_set():
            chunks = list(stub.GenerateStream(call, timeout=WAIT_S))
            assert chunks[-1].HasField("finish_info")
        channel.unsubscribe(follow)


def test_limits_and_keepalive(stack: Stack) -> None:
    options = dict(server_options())
    expected = {
        "grpc.max_receive_message_length": 16 * 2**20,
        "grpc.max_send_message_length": 64 * 2**20,
        "grpc.keepalive_time_ms": 30_000,
        "grpc.keepalive_timeout_ms": 10_000,
        "grpc.http2.ping_timeout_ms": 10_000,
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.max_ping_strikes": 0,
        "grpc.http2.min_recv_ping_interval_without_data_ms": 10_000,
        "grpc.max_concurrent_streams": 1024,
        "grpc.server_handshake_timeout_ms": 10_000,
        "grpc.max_connection_idle_ms": 75_000,
        "grpc.max_allowed_incoming_connections": 4096,
    }
    assert options.items() >= expected.items()
    pinging = [
        ("grpc.keepalive_time_ms", 200),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    stack.engine.step_s = 0.02
    with grpc.insecure_channel(stack.grpc_target, options=pinging) as channel:
        stub = InferenceStub(channel)
        call = request_of(text="x", sampling_params={"max_tokens": 60})
        assert len(list(stub.GenerateStream(call, timeout=WAIT_S))) > 0  # pings do no harm
        heavy = (("x-large", "x" * 200_000),)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(request_of(text="x"), timeout=WAIT_S, metadata=heavy)
        refused: Any = caught.value
        assert refused.code() is CODES.RESOURCE_EXHAUSTED
        assert stub.Generate(request_of(text="x"), timeout=WAIT_S).choices
