"""Serve's proxy is killed: gRPC goes on, HTTP comes back by itself."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import grpc
import pytest

from benchmarks.harness.server import GOOD, WAIT_S, running_server
from cluster.config.gateway import GatewaySection
from cluster.launch.serve_proxy import wait_ready
from protos.inference_pb2 import GenerateRequest
from protos.inference_pb2_grpc import InferenceStub
from protos.types_pb2 import SamplingParams

pytestmark = [pytest.mark.ray, pytest.mark.slow]

_NUM_TOKENS = 400


def test_http_comes_back_and_grpc_never_went(tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=_NUM_TOKENS, temperature=0.0, ignore_eos=True)
    asked = GenerateRequest(text="ROMEO:", sampling_params=params)
    with running_server(tmp_path) as server, grpc.insecure_channel(server.grpc) as channel:
        expected = server.complete(**GOOD)["choices"]
        stub = InferenceStub(channel)
        stream = iter(stub.GenerateStream(asked, timeout=WAIT_S))
        first = list(next(stream).token_ids)
        killed = server.pid_of("ProxyActor")
        os.kill(killed, signal.SIGKILL)
        streamed = first + [token for chunk in stream for token in chunk.token_ids]
        assert len(streamed) == _NUM_TOKENS
        again = [t for c in stub.GenerateStream(asked, timeout=WAIT_S) for t in c.token_ids]
        assert again == streamed
        wait_ready(server.http, GatewaySection(), list)
        assert server.complete(**GOOD)["choices"] == expected
        assert server.pid_of("ProxyActor") != killed
