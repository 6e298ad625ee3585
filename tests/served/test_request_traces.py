"""Traces of a whole server: from a client through proxy, gateway and engine to the expert workers,
and of its controller.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from benchmarks.harness.server import GOOD, WAIT_S, Served, running_server
from benchmarks.harness.stalls import wait_until
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.calls.test_tracing import PARTS, Caller, check_tree, names, part
from tests.harness.metric_values import metric
from tests.harness.otlp_collector import Collector, plain, running_collector
from tests.served.conftest import HEADERS

pytestmark = pytest.mark.ray

STEP, WORKER, SECONDS = "expertmesh.step", "expertmesh.worker", "expertmesh.seconds."
WORKERS = {"attention-0", "expert-0", "expert-1"}
NUM_DECODES = 4
"""Decode steps with spans: the 1st, 2nd, 4th and 8th of the 11 of ``GOOD``."""


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


def read_stream(server: Served, began: threading.Event, parent: str = "") -> list[str]:
    """All lines of a long stream after its first token."""
    headers = {**HEADERS, "traceparent": parent} if parent else HEADERS
    body = {**GOOD, "max_tokens": 400, "ignore_eos": True, "stream": True}
    with (
        httpx.Client(base_url=server.http, timeout=WAIT_S) as client,
        client.stream("POST", "/v1/completions", json=body, headers=headers) as answer,
    ):
        lines = answer.iter_lines()
        assert next(lines).startswith("data: {")
        began.set()
        return [line for line in lines if line]


def without_steps(spans: list[Span]) -> list[Span]:
    """The spans of the gateway."""
    return [span for span in spans if span.name != STEP]


def steps_below(spans: list[Span], above: Span) -> dict[int, dict[str, dict[str, Any]]]:
    """By step and worker, the attributes of the spans of steps below a span."""
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for span in spans:
        if span.name == STEP and span.parent_span_id == above.span_id:
            attributes = plain(span.attributes)
            found.setdefault(attributes["expertmesh.step"], {})[attributes[WORKER]] = attributes
    return found


def count_steps(spans: list[Span], caller: Caller) -> int:
    """Spans of steps in a caller's trace."""
    return sum(span.name == STEP and span.trace_id.hex() == caller.trace_id for span in spans)


def test_a_trace_reaches_the_expert_workers_and_links_to_the_recovery_that_delayed_it(
    keyed: Served, collector: Collector
) -> None:
    caller, delayed, silent = Caller(), Caller(), Caller(flags="00")
    began = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        answers = [
            keyed.client.post(
                "/v1/completions", json=GOOD, headers={**HEADERS, "traceparent": each.parent}
            ).json()
            for each in (caller, silent)
        ]
        num_spans = len(WORKERS) * (1 + NUM_DECODES)
        collector.wait_for(lambda spans: count_steps(spans, caller) == num_spans, "their steps")
        stream = pool.submit(read_stream, keyed, began, delayed.parent)
        assert began.wait(WAIT_S)
        lose_an_expert_worker(keyed)
        stream.result(WAIT_S)
        recovery = collector.named("expertmesh.recovery")
        assert collector.trace(delayed.trace_id)

    spans = collector.trace(caller.trace_id)
    root, (decode, _) = spans[0], part(spans, "decode")
    (prefill,) = steps_below(spans, root).values()
    decodes = steps_below(spans, decode)
    assert len(decodes) == NUM_DECODES
    for step in (prefill, *decodes.values()):
        assert step.keys() == WORKERS
        laps = {name.rpartition(".")[2] for name in step["attention-0"] if SECONDS in name}
        assert laps == {"attention", "dispatch", "combine", "sample"}
        laps = {name.rpartition(".")[2] for name in step["expert-1"] if SECONDS in name}
        assert laps == {"receive", "experts", "send"}
    num_rows = answers[0]["usage"]["prompt_tokens"]
    assert prefill["expert-0"]["expertmesh.rows.prefill"] == num_rows

    (link,) = (
        link
        for link in collector.trace(delayed.trace_id)[0].links
        if plain(link.attributes)["expertmesh.change"] == recovery.name
    )
    assert (link.trace_id, link.span_id) == (recovery.trace_id, recovery.span_id)
    assert not root.links, "it was over before"
    assert all(span.trace_id.hex() != silent.trace_id for span in collector.spans)


@pytest.mark.slow
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
            spans = without_steps(collector.trace(caller.trace_id))
            check_tree(caller, spans)
            assert names(spans) == PARTS
            port = plain(spans[0].attributes)["server.port"]
            assert port == int(address.rpartition(":")[2])
            assert part(spans, "decode")[1]["expertmesh.worker"] == "attention-0"
        recovery = plain(collector.named("expertmesh.recovery").attributes)
        assert recovery == {"expertmesh.lost_workers": ["expert-1"]}
