"""A gateway that is about to stop: it finishes what it has, and clients go elsewhere."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import json_format

from cluster.config.gateway import ShutdownStage
from gateway.core.tuning import GatewayTuning
from protos import admin_pb2
from protos import inference_pb2 as pb
from protos.admin_pb2_grpc import AdminStub
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.stack import WAIT_S, Stack, post, running_stack

NUM_TOKENS = 8
ENDLESS = {"prompt": "x", "max_tokens": NUM_TOKENS, "ignore_eos": True}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "y"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "y"}]},
    "/v1/embeddings": {"input": "y"},
    "/score": {"queries": "x", "documents": "y"},
}


@pytest.fixture
def stack() -> Iterator[Stack]:
    """A gateway of its own: there is no way back."""
    with running_stack(tuning=GatewayTuning(leaving_lead_s=0.0)) as stack:
        yield stack


def leave(stack: Stack) -> dict[str, Any]:
    """The order, given to the admin port."""
    answer = httpx.post(f"http://{stack.admin.http}/admin/v1/gateway/drain", timeout=WAIT_S)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_requests_end_well_and_new_ones_are_refused(stack: Stack) -> None:
    assert leave_and_read(stack) == NUM_TOKENS
    stack.wait_for(lambda: leave(stack)["requests"] == 0, "the ticket to be given back")
    with grpc.insecure_channel(stack.admin.grpc) as channel:
        left = AdminStub(channel).DrainGateway(admin_pb2.DrainGatewayRequest())
    assert (left.gateway, left.requests) == ("gateway-test", 0)


def leave_and_read(stack: Stack) -> int:
    """Order it while a gRPC stream runs, and look at what clients meet; the stream's tokens."""
    stack.engine.pause_after = 2
    with grpc.insecure_channel(stack.grpc_target) as channel:
        params = {"max_tokens": NUM_TOKENS, "ignore_eos": True}
        message = {"text": "x", "sampling_params": params}
        request = json_format.ParseDict(message, pb.GenerateRequest())
        chunks: Any = InferenceStub(channel).GenerateStream(request, timeout=WAIT_S)
        first = next(chunks)
        assert leave(stack) == {"schema": 1, "gateway": "gateway-test", "requests": 1}
        ready = stack.http.get("/ready")
        assert (ready.status_code, ready.json()["reasons"]) == (
            503,
            ["this gateway is about to stop"],
        )
        stack.wait_for(lambda: not takes_grpc(stack), "the gRPC port to close")
        stack.engine.pause_after = None
        answer = post(stack, "/v1/completions", prompt="y", max_tokens=1)  # somebody comes late
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        return sum(len(c.token_ids) for c in (first, *chunks))


def takes_grpc(stack: Stack) -> bool:
    """Whether a new connection gets an answer."""
    with grpc.insecure_channel(stack.grpc_target) as channel, contextlib.suppress(grpc.RpcError):
        InferenceStub(channel).ListModels(pb.ListModelsRequest(), timeout=WAIT_S)
        return True
    return False


def test_the_end_of_the_server_comes_in_stages(stack: Stack) -> None:
    """Not ready but serving; then no new requests; then not even running ones."""
    stack.engine.pause_after = 2
    with stack.http.stream("POST", "/v1/completions", json=ENDLESS | {"stream": True}) as running:
        lines = (line for line in running.iter_lines() if line)
        next(lines)
        assert end(stack, "lead") == 1
        assert stack.http.get("/ready").status_code == 503
        assert stack.http.get("/health").status_code == 200
        late = stack.http.post("/v1/completions", json={"prompt": "y", "max_tokens": 1})
        assert late.status_code == 200
        assert end(stack, "refuse") == 1
        for path, body in BODIES.items():
            refused = post(stack, path, **body)
            error = refused.json()["error"]
            assert (refused.status_code, error["type"]) == (503, "service_unavailable")
            assert error["code"] == "draining"
            assert int(refused.headers["retry-after"]) >= 1
        assert end(stack, "fail") == 1
        *_, last, done = lines
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "draining"
    assert done == "data: [DONE]"
    stack.wait_for(lambda: end(stack, "fail") == 0, "the ticket to be given back")


def end(stack: Stack, stage: ShutdownStage) -> int:
    """Send the gateway a stage of the end; returns the requests that run."""

    async def tell() -> int:
        return stack.gateway.shut_down(stage, time.monotonic())

    return stack.run(tell())


def test_one_that_is_not_asked_keeps_its_connections(stack: Stack) -> None:
    assert "connection" not in post(stack, "/v1/completions", prompt="y", max_tokens=1).headers
    assert not stack.gateway.readiness.is_leaving
    assert takes_grpc(stack)
