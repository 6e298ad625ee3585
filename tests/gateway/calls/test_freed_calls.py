"""Calls are freed when they end, without the garbage collector, which a gateway rarely runs."""

from __future__ import annotations

import gc
from collections.abc import Callable

import grpc
import pytest

from gateway.calls.running_call import RunningCall
from protos.inference_pb2 import GenerateRequest
from protos.inference_pb2_grpc import InferenceStub
from protos.types_pb2 import SamplingParams, TokenIds
from tests.gateway.stack import Stack, post, running_stack


def call_http(stack: Stack) -> None:
    for streams in (False, True):
        answer = post(stack, "/v1/completions", prompt="hello", max_tokens=3, stream=streams)
        assert answer.status_code == 200


def call_grpc(stack: Stack) -> None:
    params = SamplingParams(max_tokens=3)
    with grpc.insecure_channel(stack.grpc_target) as channel:
        stub = InferenceStub(channel)
        list(
            stub.GenerateStream(
                GenerateRequest(token_ids=TokenIds(ids=[5, 6]), sampling_params=params)
            )
        )


@pytest.mark.parametrize("call", [call_http, call_grpc])
def test_a_call_is_freed_at_its_end(call: Callable[[Stack], None]) -> None:
    with running_stack() as stack:
        call(stack)
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                call(stack)
            stack.wait_no_requests()
            stack.wait_for(lambda: num_calls() == 0, "the end of all calls")
        finally:
            gc.enable()


def num_calls() -> int:
    return sum(type(one) is RunningCall for one in gc.get_objects())
