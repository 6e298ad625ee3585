"""``best_of``: more choices are drawn than returned: those with the most probable tokens."""

from __future__ import annotations

from math import fsum
from typing import Any

import grpc
import pytest
from google.protobuf import json_format

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.stack import WAIT_S, Stack, complete, post

CALL: dict[str, Any] = {"prompt": ["hello", "other"], "max_tokens": 5, "seed": 3}


def mean(choice: dict[str, Any]) -> float:
    values = choice["logprobs"]["token_logprobs"]
    return fsum(values) / len(values)


def test_the_best_are_returned_best_first(stack: Stack) -> None:
    drawn = complete(stack, **CALL, n=5, logprobs=0)["choices"]
    answer = complete(stack, **CALL, n=2, best_of=5, logprobs=0)
    expected = []
    for place in range(2):
        ranked = sorted(drawn[5 * place : 5 * place + 5], key=mean, reverse=True)
        expected += ranked[:2]
    chosen = answer["choices"]
    assert [choice["index"] for choice in chosen] == [0, 1, 2, 3]
    assert [choice["text"] for choice in chosen] == [choice["text"] for choice in expected]
    assert [choice["logprobs"] for choice in chosen] == [choice["logprobs"] for choice in expected]
    assert answer["usage"]["completion_tokens"] == 2 * 5 * 5


def test_no_log_probability_is_returned_unasked(stack: Stack) -> None:
    ranked = complete(stack, **CALL, best_of=5)["choices"]
    chosen = complete(stack, **CALL, best_of=5, logprobs=0)["choices"]
    assert [choice["logprobs"] for choice in ranked] == [None, None]
    assert [choice["text"] for choice in ranked] == [choice["text"] for choice in chosen]


def test_best_of_n_draws_no_more(stack: Stack) -> None:
    same = complete(stack, **CALL, n=3, best_of=3)
    assert same["choices"] == complete(stack, **CALL, n=3)["choices"]
    answer = post(stack, "/v1/completions", **CALL, n=3, best_of=3, stream=True)
    assert answer.status_code == 200


@pytest.mark.parametrize(
    "fields",
    [{"best_of": 1, "n": 2}, {"best_of": 0}, {"best_of": 17}, {"best_of": 2, "stream": True}],
    ids=["below n", "zero", "above the limit", "stream"],
)
def test_what_is_refused(stack: Stack, fields: dict[str, Any]) -> None:
    answer = post(stack, "/v1/completions", prompt="x", **fields)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "best_of")


def test_choices_of_all_prompts_are_bounded(stack: Stack) -> None:
    answer = post(stack, "/v1/completions", prompt=["x"] * 100, best_of=6)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "best_of")


def test_the_same_over_grpc(stack: Stack) -> None:
    sampling = {"max_tokens": 5, "seed": 3, "n": 2, "best_of": 5}
    fields = {"text": "hello", "sampling_params": sampling}
    request = json_format.ParseDict(fields, pb.GenerateRequest())
    over_http = complete(stack, **{**CALL, "prompt": "hello"}, n=2, best_of=5)["choices"]
    with grpc.insecure_channel(stack.grpc_target) as channel:
        stub = InferenceStub(channel)
        found = stub.Generate(request, timeout=WAIT_S).choices
        assert [(c.index, c.text) for c in found] == [(c["index"], c["text"]) for c in over_http]
        stream: Any = stub.GenerateStream(request, timeout=WAIT_S)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        chat = {"messages": {"messages": [{"role": "user", "content": "x"}]}}
        request = json_format.ParseDict(chat | {"sampling_params": sampling}, pb.GenerateRequest())
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(request, timeout=WAIT_S)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
