"""Calls are freed when they end, without the garbage collector, which a gateway rarely runs."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest

from gateway.calls.running_call import RunningCall
from gateway.grpc.call import GrpcCall
from protos.inference_pb2 import GenerateRequest
from protos.inference_pb2_grpc import InferenceStub
from protos.types_pb2 import SamplingParams, TokenIds
from tests.gateway.stack import Stack, post, running_stack

STREAM = {"prompt": "hello", "max_tokens": 3, "stream": True}
REQUEST = GenerateRequest(
    token_ids=TokenIds(ids=[5, 6]), sampling_params=SamplingParams(max_tokens=3)
)
FREED = (RunningCall, GrpcCall)


def call_http(stack: Stack) -> None:
    for streams in (False, True):
        answer = post(stack, "/v1/completions", **STREAM | {"stream": streams})
        assert answer.status_code == 200


def call_http_in_vain(stack: Stack) -> None:
    with failing(stack):
        post(stack, "/v1/completions", **STREAM)


def leave_http(stack: Stack) -> None:
    with paused(stack), closing(HTTPConnection(urlsplit(stack.url).netloc)) as connection:
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(STREAM), headers)
        stack.wait_for(lambda: bool(stack.engine.running), "the request")
    stack.wait_for(lambda: not stack.engine.running, "its end")


def call_grpc(stack: Stack) -> None:
    with grpc.insecure_channel(stack.grpc_target) as channel:
        list(InferenceStub(channel).GenerateStream(REQUEST))


def call_grpc_in_vain(stack: Stack) -> None:
    with (
        failing(stack),
        grpc.insecure_channel(stack.grpc_target) as channel,
        pytest.raises(grpc.RpcError),
    ):
        list(InferenceStub(channel).GenerateStream(REQUEST))


def call_grpc_wrongly(stack: Stack) -> None:
    wrong = GenerateRequest(sampling_params=SamplingParams(max_tokens=3))
    with grpc.insecure_channel(stack.grpc_target) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            InferenceStub(channel).Generate(wrong)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/expertmesh.v1.Inference/Unknown", bytes, bytes)(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def leave_grpc(stack: Stack) -> None:
    with paused(stack), grpc.insecure_channel(stack.grpc_target) as channel:
        call: Any = InferenceStub(channel).GenerateStream(REQUEST)
        stack.wait_for(lambda: bool(stack.engine.running), "the request")
        call.cancel()
        stack.wait_for(lambda: not stack.engine.running, "its end")


@contextmanager
def failing(stack: Stack) -> Iterator[None]:
    """Calls fail at the worker."""
    stack.engine.error = ("it broke", "internal_error")
    yield
    stack.engine.error = None


@contextmanager
def paused(stack: Stack) -> Iterator[None]:
    """The worker sends no tokens."""
    stack.engine.is_paused = True
    yield
    stack.engine.is_paused = False


CALLS = (
    call_http,
    call_http_in_vain,
    leave_http,
    call_grpc,
    call_grpc_in_vain,
    call_grpc_wrongly,
    leave_grpc,
)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_freed_at_its_end(call: Callable[[Stack], None]) -> None:
    with running_stack() as stack:
        call_http(stack)
        call(stack)
        stack.wait_no_requests()
        gc.collect()
        others = calls_in_memory()  # of other tests in this process
        gc.disable()
        try:
            for _ in range(5):
                call(stack)
            stack.wait_no_requests()
            stack.wait_for(lambda: len(calls_in_memory()) == len(others), "the end of all calls")
        finally:
            gc.enable()


def calls_in_memory() -> list[object]:
    return [one for one in gc.get_objects() if type(one) in FREED]
