"""Far more requests than fit into the queue, over HTTP and gRPC at once."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from benchmarks.harness.server import WAIT_S, Served
from protos import inference_pb2 as pb
from protos import types_pb2
from protos.inference_pb2_grpc import InferenceStub
from tests.served.conftest import HEADERS, NUM_PLACES

pytestmark = pytest.mark.ray

NUM_CALLS = 24
"""Of each protocol, at once."""
NUM_TOKENS = 200
METADATA = (("authorization", HEADERS["authorization"]),)


def post(server: Served) -> str:
    """The status of a completion, whole or refused as it should be."""
    body = {"prompt": "ROMEO:", "max_tokens": NUM_TOKENS, "ignore_eos": True}
    response = server.client.post("/v1/completions", json=body, headers=HEADERS)
    answer: dict[str, Any] = response.json()
    if response.status_code == 200:
        assert answer["usage"]["completion_tokens"] == NUM_TOKENS
        return "accepted"
    assert response.status_code == 429, answer
    assert answer["error"]["code"] == "queue_full"
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert 1000 <= int(response.headers["retry-after-ms"]) <= 60_000
    return "refused"


def call(stub: InferenceStub) -> str:
    """The same over gRPC."""
    params = types_pb2.SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    request = pb.GenerateRequest(text="ROMEO:", sampling_params=params)
    error: Any = None
    try:
        answer = stub.Generate(request, timeout=WAIT_S, metadata=METADATA)
    except grpc.RpcError as err:
        error = err
    if error is not None:
        assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, error
        assert 1 <= retry_s(error) <= 60
        return "refused"
    assert len(answer.choices[0].token_ids) == NUM_TOKENS
    return "accepted"


def retry_s(error: Any) -> float:
    """Seconds of the ``RetryInfo``."""
    details = dict(error.trailing_metadata())["grpc-status-details-bin"]
    info = error_details_pb2.RetryInfo()
    assert any(one.Unpack(info) for one in status_pb2.Status.FromString(details).details)
    return float(info.retry_delay.ToMilliseconds()) / 1000


def test_a_flood_is_refused_with_a_retry_time_and_what_is_accepted_ends(keyed: Served) -> None:
    go = threading.Barrier(2 * NUM_CALLS)

    def flood(stub: InferenceStub | None) -> tuple[str, str]:
        go.wait(WAIT_S)
        return ("gRPC", call(stub)) if stub is not None else ("HTTP", post(keyed))

    with grpc.insecure_channel(keyed.grpc) as channel, ThreadPoolExecutor(2 * NUM_CALLS) as pool:
        stubs = [InferenceStub(channel), None] * NUM_CALLS
        outcomes = Counter(pool.map(flood, stubs))
        assert outcomes.total() == 2 * NUM_CALLS
        assert outcomes["HTTP", "refused"] > 0
        assert outcomes["gRPC", "refused"] > 0
        num_accepted = outcomes["HTTP", "accepted"] + outcomes["gRPC", "accepted"]
        assert num_accepted >= NUM_PLACES
        keyed.wait_idle()
        assert (call(InferenceStub(channel)), post(keyed)) == ("accepted", "accepted")
        keyed.wait_idle()
