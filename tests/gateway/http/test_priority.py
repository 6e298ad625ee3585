"""A request's priority: from body, header, message or metadata to the engine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.stack import Stack

COMPLETIONS = "/v1/completions"
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}
PLAIN = {"prompt": ["hello", "world"], "max_tokens": 1}


@pytest.fixture
def stub(stack: Stack) -> Iterator[InferenceStub]:
    """A client of the shared gateway."""
    with grpc.insecure_channel(stack.grpc_target) as channel:
        yield InferenceStub(channel)


def priorities(stack: Stack) -> list[int]:
    """As the engine saw them."""
    return [request.priority for request in stack.engine.requests]


@pytest.mark.parametrize(
    ("field", "header", "expected"),
    [
        ({}, {}, 0),
        ({"priority": None}, {}, 0),
        ({"priority": 7}, {}, 7),
        ({"priority": -(2**31)}, {}, -(2**31)),
        ({}, {"x-priority": "-3"}, -3),
        ({}, {"X-Priority": "+4"}, 4),
        ({"priority": 0}, {"x-priority": "9"}, 0),
    ],
)
def test_over_http(
    stack: Stack, field: dict[str, Any], header: dict[str, str], expected: int
) -> None:
    for path, body in ((COMPLETIONS, PLAIN), ("/v1/chat/completions", CHAT)):
        stack.engine.requests.clear()
        response = stack.http.post(path, json={**body, **field}, headers=header)
        assert response.status_code == 200, response.text
        assert set(priorities(stack)) == {expected}
        assert len(priorities(stack)) == len(body.get("prompt", [0]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "metadata", "expected"),
    [
        ({}, (), 0),
        ({"priority": -2}, (), -2),
        ({}, (("x-priority", "5"),), 5),
        ({"priority": 0}, (("x-priority", "5"),), 0),
    ],
)
def test_over_grpc(
    stack: Stack,
    stub: InferenceStub,
    field: dict[str, int],
    metadata: tuple[tuple[str, str], ...],
    expected: int,
) -> None:
    message = pb.GenerateRequest(text="hello", **field)  # type: ignore[arg-type]
    stub.Generate(message, metadata=metadata)
    list(stub.GenerateStream(message, metadata=metadata))
    assert priorities(stack) == [expected, expected]


@pytest.mark.parametrize(
    ("field", "header", "param"),
    [
        ({"priority": 2**31}, {}, "priority"),
        ({"priority": -(2**31) - 1}, {}, "priority"),
        ({"priority": "high"}, {}, "priority"),
        ({"priority": 1.5}, {}, "priority"),
        ({"priority": True}, {}, "priority"),
        ({}, {"x-priority": "high"}, "x-priority"),
        ({}, {"x-priority": "1.5"}, "x-priority"),
        ({}, {"x-priority": ""}, "x-priority"),
        ({"priority": 1}, {"x-priority": "1e3"}, "x-priority"),
        ({}, {"x-priority": "9999999999"}, "priority"),
        ({}, {"x-priority": "-99999999999999999999999"}, "x-priority"),
    ],
)
def test_what_is_no_priority(
    stack: Stack, field: dict[str, Any], header: dict[str, str], param: str
) -> None:
    response = stack.http.post(COMPLETIONS, json={**PLAIN, **field}, headers=header)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("invalid_value", param)
    assert param in error["message"]
    assert not stack.engine.requests


@pytest.mark.parametrize("digits", [10, 23, 5000])
def test_a_priority_of_many_digits_gets_the_range(stack: Stack, digits: int) -> None:
    response = stack.http.post(COMPLETIONS, json=PLAIN, headers={"x-priority": "9" * digits})
    assert response.status_code == 400
    bounds = "must be at least -2147483648 and at most 2147483647"
    assert bounds in response.json()["error"]["message"]


def test_what_is_no_priority_over_grpc(stack: Stack, stub: InferenceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(pb.GenerateRequest(text="x"), metadata=(("x-priority", "high"),))
    refused: Any = caught.value
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "x-priority ('high') must be a whole number" in refused.details()
