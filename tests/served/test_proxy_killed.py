"""Serve's proxy is killed: gRPC goes on, HTTP comes back by itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest

from cluster.orphans import find_by_files
from protos.inference_pb2 import GenerateRequest
from protos.inference_pb2_grpc import InferenceStub
from protos.types_pb2 import SamplingParams
from tests.served.server import GOOD, WAIT_S, Served, running_server

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_http_comes_back_and_grpc_never_went(tmp_path: Path) -> None:
    with running_server(tmp_path) as server, grpc.insecure_channel(server.grpc) as channel:
        expected = server.complete(**GOOD)["choices"]
        asked = GenerateRequest(text="ROMEO:", sampling_params=SamplingParams(max_tokens=60))
        stream: Any = InferenceStub(channel).GenerateStream(asked, timeout=WAIT_S)
        next(stream)
        killed = _proxy(server)
        killed.kill()
        killed.wait(WAIT_S)
        assert sum(len(chunk.token_ids) for chunk in stream) > 1
        deadline = time.monotonic() + WAIT_S
        while not _is_ready(server):
            assert time.monotonic() < deadline, "HTTP did not come back"
            time.sleep(0.05)
        assert server.complete(**GOOD)["choices"] == expected
        assert _proxy(server).pid != killed.pid


def _proxy(server: Served) -> psutil.Process:
    found = [psutil.Process(identity.pid) for identity in find_by_files(server.folder)]
    (proxy,) = [p for p in found if "ProxyActor" in " ".join(p.cmdline())]
    return proxy


def _is_ready(server: Served) -> bool:
    try:
        return httpx.get(f"{server.http}/ready", timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False
