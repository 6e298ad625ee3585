"""One request from its body to its sequences: the shapes that it passes, and no others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from unittest import mock

import grpc
import pytest
from pydantic import BaseModel

from gateway.calls.gateway import Gateway
from gateway.calls.running_call import RunningCall
from gateway.calls.served_model import ServedModel
from gateway.core.call import GenerateCall
from gateway.engines.submission import Submission
from gateway.grpc import api as grpc_api
from gateway.http import api as http_api
from gateway.http.schema import CompletionBody
from gateway.text.tokenizer import load_tokenizer
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.stack import Stack, post
from tests.harness.served_stack import stack_over
from tests.paths import DEMO
from workers.process.gateway_streams import GatewayStreams
from workers.requests.request import Request
from workers.requests.sequence import SequenceState

NUM_CHOICES = 2


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with stack_over(DEMO, load_tokenizer(str(DEMO))) as stack:
        yield stack


def over_http(stack: Stack) -> None:
    body = {"prompt": "ROMEO:", "max_tokens": 3, "n": NUM_CHOICES, "session_id": "a"}
    assert post(stack, "/v1/completions", **body).status_code == 200


def over_grpc(stack: Stack) -> None:
    message = pb.GenerateRequest(text="ROMEO:", session_id="a")
    message.sampling_params.max_tokens, message.sampling_params.n = 3, NUM_CHOICES
    with grpc.insecure_channel(stack.grpc_target) as channel:
        InferenceStub(channel).Generate(message)


class Walk:
    """What a request was at each place that it passed."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []
        self._lock = threading.Lock()

    def note(self, place: str, value: Any) -> None:
        with self._lock:
            self.seen.append((place, value))

    def at(self, place: str) -> list[Any]:
        return [value for name, value in self.seen if name == place]


def watched(walk: Walk, place: str, real: Callable[..., Any], index: int) -> Callable[..., Any]:
    """A function that notes one of its arguments."""

    def watch(*arguments: Any, **named: Any) -> Any:
        result = real(*arguments, **named)
        walk.note(place, arguments[index])
        return result

    return watch


@pytest.mark.parametrize(
    ("send", "module", "convert", "body_type"),
    [
        (over_http, http_api, "completion_call", CompletionBody),
        (over_grpc, grpc_api, "grpc_call", pb.GenerateRequest),
    ],
)
def test_a_request_passes_four_shapes(
    stack: Stack, send: Callable[[Stack], None], module: Any, convert: str, body_type: type
) -> None:
    walk = Walk()
    places = (
        ("body", module, convert, 0),
        ("call", Gateway, "start", 1),
        ("name", ServedModel, "adapter_of", 1),
        ("running", RunningCall, "__post_init__", 0),
        ("record", Submission, "message", 0),
        ("worker", GatewayStreams, "handle_message", 1),
        ("sequence", SequenceState, "__post_init__", 0),
    )
    with ExitStack() as patches:
        for place, owner, name, index in places:
            watch = watched(walk, place, getattr(owner, name), index)
            patches.enter_context(mock.patch.object(owner, name, watch))
        send(stack)
    (body,), (call,), (running,), (record,) = map(walk.at, ("body", "call", "running", "record"))
    (received,) = [message for message in walk.at("worker") if isinstance(message, Request)]
    sequences = walk.at("sequence")
    # the protocol's body, a call, a request, its sequences
    assert type(body) is body_type
    assert isinstance(body, BaseModel) or module is grpc_api
    assert type(call) is GenerateCall
    assert type(received) is Request
    assert [type(sequence) for sequence in sequences] == [SequenceState] * NUM_CHOICES
    # each of them is made once: the records around them have no copy
    assert type(running.call) is GenerateCall
    assert [record.request] == list(running.requests)
    assert record.request is running.requests[0]
    assert all(sequence.request is received for sequence in sequences)
    assert (received.session, received.n) == (call.session, NUM_CHOICES)
    assert received.prompt == record.request.prompt
    assert walk.at("name") == [call.model], "looked up once"
