"""``expertmesh serve`` with mutual TLS, through Serve's own proxy."""

from __future__ import annotations

import subprocess
from pathlib import Path

import grpc
import httpx
import pytest

from benchmarks.harness.server import GOOD, WAIT_S, command, environment, running_server
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.grpc.test_grpc import request_of
from tests.harness.certificates import Certificates

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_mutual_tls_on_every_port(tmp_path: Path) -> None:
    made = Certificates.make(tmp_path)
    words = ["--tls-cert", str(made.server_cert), "--tls-key", str(made.server_key)]
    words += ["--tls-client-ca", str(made.client_ca), "--api-key", "k"]
    key = {"authorization": "Bearer k"}
    with running_server(tmp_path, *words) as server:
        assert server.http.startswith("https://")
        known = made.context(with_client=True)
        with httpx.Client(base_url=server.http, verify=known, timeout=WAIT_S) as client:
            assert client.get("/health").status_code == 200
            assert client.post("/v1/completions", json=dict(GOOD)).status_code == 401
            answer = client.post("/v1/completions", json=dict(GOOD), headers=key)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"]
        for url in (server.http, server.http.replace("https", "http")):
            with pytest.raises(httpx.HTTPError):
                httpx.get(f"{url}/health", verify=made.context(with_client=False), timeout=WAIT_S)
        message = request_of(text="ROMEO:", sampling_params={"max_tokens": 4})
        given = (("authorization", "Bearer k"),)
        with made.channel(server.grpc, with_client=True) as channel:
            assert InferenceStub(channel).Generate(message, metadata=given, timeout=WAIT_S).choices
        with made.channel(server.grpc, with_client=False) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                InferenceStub(channel).Generate(message, metadata=given, timeout=WAIT_S)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        drain = command("drain", "worker", "no-such-worker", "--url", server.http, "--api-key", "k")
        drain += ["--ca-cert", str(made.server_ca)]
        own = ["--client-cert", str(made.client_cert), "--client-key", str(made.client_key)]
        for more, code in (([], 3), (own, 5)):
            done = subprocess.run(
                [*drain, *more], capture_output=True, timeout=WAIT_S, env=environment(tmp_path)
            )
            assert done.returncode == code, done.stderr
