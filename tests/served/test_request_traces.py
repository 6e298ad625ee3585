"""Traces of a whole server: through Serve's proxy and over gRPC, and of its controller."""

from __future__ import annotations

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import pytest

from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.generation.test_tracing import PARTS, Caller, check_tree, names, part
from tests.harness.metric_values import metric
from tests.harness.otlp_collector import plain, running_collector
from tests.harness.stalls import wait_until
from tests.served.server import GOOD, WAIT_S, Served, running_server

pytestmark = pytest.mark.ray


def ask(server: Served, web: Caller, rpc: Caller) -> None:
    """A stream over HTTP, and a call over gRPC."""
    headers = {"traceparent": web.parent, "tracestate": "vendor=1"}
    server.client.post("/v1/completions", json={**GOOD, "stream": True}, headers=headers)
    request = pb.GenerateRequest(text=GOOD["prompt"])
    metadata = (("traceparent", rpc.parent), ("tracestate", "vendor=1"))
    with grpc.insecure_channel(server.grpc) as channel:
        InferenceStub(channel).Generate(request, metadata=metadata, timeout=WAIT_S)


def lose_an_expert_worker(server: Served) -> None:
    """Kill one, and wait until requests are served again."""
    (lost,) = (w for w in server.status()["workers"] if w["name"] == "expert-1")
    os.kill(lost["pid"], signal.SIGKILL)
    wait_until(
        lambda: metric(server.status(), "recovery_stall_seconds_count"), "the loss to be made good"
    )


def read_stream(server: Served, began: threading.Event) -> list[str]:
    """All lines of a long stream after its first token."""
    body = {**GOOD, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(base_url=server.http, timeout=WAIT_S) as client,
        client.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        began.set()
        return [line for line in lines if line]


def test_requests_and_a_recovery_are_traced_and_a_stream_outlasts_the_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gateway and controller send at their end what they have kept.

    They keep everything so long: variables of OpenTelemetry's SDK reach them.
    """
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "600000")
    web, rpc = Caller(), Caller()
    began = threading.Event()
    with ThreadPoolExecutor(1) as pool, running_collector() as collector:
        with running_server(tmp_path, "--otlp-endpoint", collector.endpoint) as server:
            ask(server, web, rpc)
            lose_an_expert_worker(server)
            assert not collector.spans
            stream = pool.submit(read_stream, server, began)
            assert began.wait(WAIT_S)
        *_, last, done = stream.result(WAIT_S)
        assert json.loads(last.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert done == "data: [DONE]"
        for caller, address in ((web, server.http), (rpc, server.grpc)):
            spans = collector.trace(caller.trace_id)
            check_tree(caller, spans)
            assert names(spans) == PARTS
            port = plain(spans[0].attributes)["server.port"]
            assert port == int(address.rpartition(":")[2])
            assert part(spans, "decode")[1]["expertmesh.worker"] == "attention-0"
        recovery = plain(collector.named("expertmesh.recovery").attributes)
        assert recovery == {"expertmesh.lost_workers": ["expert-1"]}
