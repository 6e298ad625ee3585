"""A line in the log for each request that has ended."""

from __future__ import annotations

import logging
from typing import Any

import grpc
import pytest

from cluster.tracing import logs
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.stack import Stack, post


def ended(caplog: pytest.LogCaptureFixture, name: str) -> list[dict[str, Any]]:
    records = [r for r in caplog.records if r.name == "gateway.calls.request_log"]
    return [fields for r in records if (fields := logs.fields_of(r))["route"] == name]


def wait_line(stack: Stack, caplog: pytest.LogCaptureFixture, name: str) -> dict[str, Any]:
    """The one line of a request that its client has the answer of."""
    stack.wait_for(lambda: bool(ended(caplog, name)), "the line")
    (line,) = ended(caplog, name)
    return line


def test_a_completion_says_what_it_cost(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        post(stack, "/v1/completions", prompt="hello", max_tokens=7, model="tiny")
        line = wait_line(stack, caplog, "/v1/completions")
    assert line["message"] == "request ended"
    assert (line["port"], line["status"], line["output_tokens"]) == ("http", "200", 7)
    assert line["prompt_tokens"] > 0
    assert 0 < line["ttft_ms"] <= line["ms"]


def test_a_refusal_has_no_tokens(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        post(stack, "/v1/chat/completions", model="other", messages=[])
        line = wait_line(stack, caplog, "/v1/chat/completions")
    assert line["status"] in ("400", "404")
    assert "output_tokens" not in line


def test_grpc_and_probes(stack: Stack, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), grpc.insecure_channel(stack.grpc_target) as channel:
        request = pb.GenerateRequest(model="tiny", text="hello")
        request.sampling_params.max_tokens = 3
        InferenceStub(channel).Generate(request)
        stack.http.get("/health")
        line = wait_line(stack, caplog, "Generate")
    assert (line["port"], line["status"], line["output_tokens"]) == ("grpc", "OK", 3)
    assert ended(caplog, "/health") == []
