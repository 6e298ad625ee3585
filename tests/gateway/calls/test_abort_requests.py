"""``AbortRequests``: an operator ends clients' requests by id, at any replica, over both codecs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import pytest

from gateway.admin.calls import MAX_ABORTED
from protos import admin_pb2 as pb
from protos import inference_pb2
from protos.admin_pb2_grpc import AdminStub
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.grpc.test_grpc import request_of
from tests.gateway.stack import WAIT_S, Stack

CODE = "request_aborted"


@pytest.fixture
def admin(stack: Stack) -> Iterator[AdminStub]:
    with grpc.insecure_channel(stack.admin.grpc) as channel:
        yield AdminStub(channel)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def begin(
    stack: Stack, pool: ThreadPoolExecutor, name: str, **fields: Any
) -> Future[httpx.Response]:
    """A completion that runs until it is ended; returns once an engine has it."""
    stack.engine.step_s = 0.02
    known = len(stack.engine.requests)
    body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, **fields}
    headers = {"x-request-id": name}
    answer = pool.submit(stack.http.post, "/v1/completions", json=body, headers=headers)
    stack.wait_for(lambda: len(stack.engine.requests) > known, "the request")
    return answer


def abort(admin: AdminStub, *names: str) -> list[str]:
    return list(admin.AbortRequests(pb.AbortRequestsRequest(request_ids=names)).aborted)


def test_a_request_is_ended_with_its_error(
    stack: Stack, admin: AdminStub, pool: ThreadPoolExecutor
) -> None:
    ended, other = begin(stack, pool, "mine-1"), begin(stack, pool, "mine-2", max_tokens=40)
    assert abort(admin, "mine-1", "nobody-s", "mine-1") == ["mine-1"]
    answer = ended.result(WAIT_S)
    assert answer.status_code == 409
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["code"] == CODE
    assert other.result(WAIT_S).status_code == 200
    stack.wait_for(lambda: not stack.engine.running, "the abort in the engine")
    stack.wait_for(lambda: not len(stack.gateway.running), "the end of both calls")
    assert abort(admin, "mine-1") == []


def test_the_ids_of_answers_are_names_too(
    stack: Stack, admin: AdminStub, pool: ThreadPoolExecutor
) -> None:
    answer = begin(stack, pool, "mine-3", request_id="order-7")
    assert abort(admin, "cmpl-order-7") == ["cmpl-order-7"]
    assert answer.result(WAIT_S).status_code == 409


def test_a_stream_reports_it_in_an_event(stack: Stack, admin: AdminStub) -> None:
    stack.engine.step_s = 0.02
    body = {"prompt": "x", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with stack.http.stream("POST", "/v1/completions", json=body) as response:
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        name = json.loads(next(lines))["id"]
        assert abort(admin, name) == [name]
        *_, error, done = lines
    assert (json.loads(error)["error"]["code"], done) == (CODE, "[DONE]")


def test_the_same_over_grpc_and_by_the_other_admin_port(stack: Stack) -> None:
    stack.engine.step_s = 0.02
    url = f"http://{stack.admin.http}/admin/v1/requests/abort"
    with grpc.insecure_channel(stack.grpc_target) as channel:
        request = request_of(text="x", sampling_params={"max_tokens": 400, "ignore_eos": True})
        request.request_id = "by-grpc"
        stream: Any = InferenceStub(channel).GenerateStream(request, timeout=WAIT_S)
        assert isinstance(next(stream), inference_pb2.GenerateChunk)
        found = httpx.post(url, json={"request_ids": ["by-grpc"]}, timeout=WAIT_S).json()
        assert found == {"schema": 1, "aborted": ["by-grpc"]}
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
    assert caught.value.code() is grpc.StatusCode.ABORTED


def test_one_that_waits_for_a_worker_is_ended_too(
    stack: Stack, admin: AdminStub, pool: ThreadPoolExecutor
) -> None:
    stack.call(lambda: stack.controller.change(state="RECOVERING"))
    stack.wait_for(lambda: stack.gateway.cluster.snapshot["state"] == "RECOVERING")  # type: ignore[index]
    body = {"prompt": "x", "max_tokens": 4}
    headers = {"x-request-id": "waits"}
    answer = pool.submit(stack.http.post, "/v1/completions", json=body, headers=headers)
    stack.wait_for(lambda: len(stack.gateway.running) == 1, "the request")
    try:
        assert abort(admin, "waits") == ["waits"]
        assert answer.result(WAIT_S).status_code == 409
    finally:
        stack.serve()


@pytest.mark.parametrize("count", [0, MAX_ABORTED + 1])
def test_the_number_of_ids_is_bounded(admin: AdminStub, count: int) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        abort(admin, *map(str, range(count)))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
