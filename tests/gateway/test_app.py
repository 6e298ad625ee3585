"""The deployment for real: Ray Serve, a controller actor, a scripted engine."""

from __future__ import annotations

import contextlib
import json
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import ray
from ray import serve

from benchmarks.harness.distributed import free_ports
from benchmarks.harness.loop_thread import LoopThread
from benchmarks.harness.serving_cluster import end_shared_ray
from benchmarks.harness.stalls import wait_until
from cluster.config.cluster import ClusterConfig
from cluster.config.gateway import GatewaySection
from cluster.config.model import ModelSection
from cluster.launch import local_ray
from gateway.app import APP_NAME, build_app
from gateway.cluster.client import CONTROLLER_NAME, RAY_NAMESPACE
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.fakes import (
    CHAT_TEMPLATE,
    CLUSTER_TOKEN,
    EOS,
    FakeController,
    ScriptedEngine,
    attention_entry,
    expert_entry,
    tiny_backend,
)
from tests.gateway.sse_client import by_choice, parse_events

pytestmark = pytest.mark.ray

LIMIT_S = 120.0
PREFIX = "/some/prefix"


class ControllerActor(FakeController):
    """The fake controller as an actor."""


class Deployed:
    """A gateway behind Serve."""

    def __init__(self, engine: ScriptedEngine, controller: Any, port: int, grpc_port: int) -> None:
        self.engine = engine
        self.controller = controller
        self.grpc_target = f"127.0.0.1:{grpc_port}"
        self.port = port
        self.http = httpx.Client(
            base_url=f"http://127.0.0.1:{port}{PREFIX}", timeout=LIMIT_S, verify=False
        )

    def wait_for(self, condition: Any, what: str) -> None:
        """Wait until it holds."""
        wait_until(condition, what)


def _checkpoint(folder: Path) -> str:
    tiny_backend().save(str(folder / "tokenizer.json"))
    config = {"chat_template": CHAT_TEMPLATE, "eos_token": EOS}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


@contextlib.contextmanager
def _running_engine() -> Iterator[ScriptedEngine]:
    """A scripted engine in a thread of this process."""
    thread, engine = LoopThread(LIMIT_S), ScriptedEngine()
    thread.run(engine.start())
    yield engine
    thread.run(engine.stop())
    thread.close()


@contextlib.contextmanager
def _local_ray() -> Iterator[None]:
    end_shared_ray()
    with (
        tempfile.TemporaryDirectory(prefix="em", dir="/tmp") as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in local_ray.common_environment().items():
            patch.setenv(name, value)
        local_ray.begin(Path(folder), num_cpus=2)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    port, grpc_port = free_ports(2)
    config = ClusterConfig(
        model=ModelSection(
            path=_checkpoint(tmp_path_factory.mktemp("checkpoint")), served_model_name="tiny"
        ),
        gateway=GatewaySection(port=port, grpc_port=grpc_port, request_timeout_s=LIMIT_S),
        cluster_token=CLUSTER_TOKEN,
    )
    # Ray first: it forks, which does not go with the threads of gRPC
    with _local_ray(), _running_engine() as engine:
        actor: Any = ray.remote(num_cpus=0)(ControllerActor)
        controller = actor.options(name=CONTROLLER_NAME, namespace=RAY_NAMESPACE).remote()
        options = {"host": "127.0.0.1", "port": port}
        serve.start(proxy_location="HeadOnly", http_options=options)
        serve.run(build_app(config.to_dict()), name=APP_NAME, route_prefix=PREFIX)
        gateway = Deployed(engine, controller, port, grpc_port)
        try:
            yield gateway
        finally:
            gateway.http.close()
            serve.shutdown()  # type: ignore[no-untyped-call]


def _serve_cluster(gateway: Deployed) -> None:
    workers = [attention_entry(gateway.engine), expert_entry(0)]
    ray.get(gateway.controller.change.remote(state="SERVING", workers=workers), timeout=LIMIT_S)
    ready = lambda: gateway.http.get("/ready").status_code == 200  # noqa: E731
    gateway.wait_for(ready, "readiness")


def test_the_gateway_from_its_start_to_its_end(deployed: Deployed) -> None:
    """One test, as a deployment is expensive: the steps are named below."""
    _is_up_before_the_cluster(deployed)
    _is_not_elsewhere(deployed)
    _serve_cluster(deployed)
    _answers_over_http(deployed)
    _streams(deployed)
    _answers_over_grpc(deployed)
    _refuses_bad_input(deployed)
    _notices_clients_that_leave(deployed)
    _reports_the_cluster(deployed)
    _ends(deployed)


def _is_up_before_the_cluster(gateway: Deployed) -> None:
    assert gateway.http.get("/health").status_code == 200
    assert gateway.http.get("/ready").status_code == 503
    with grpc.insecure_channel(gateway.grpc_target) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            InferenceStub(channel).Generate(pb.GenerateRequest(text="x"), timeout=LIMIT_S)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.UNAVAILABLE


def _is_not_elsewhere(gateway: Deployed) -> None:
    response = httpx.get(f"http://127.0.0.1:{gateway.port}/elsewhere", timeout=LIMIT_S)
    assert response.status_code == 404
    assert response.headers["content-type"].startswith("text/plain")


def _answers_over_http(gateway: Deployed) -> None:
    fields = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    response = gateway.http.post(
        "/v1/chat/completions", json=fields, headers={"x-request-id": "mine"}
    )
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 3
    assert response.headers.get_list("x-request-id") == ["mine"]
    assert response.headers["x-expertmesh-placement-epoch"] == "3"
    replaced = gateway.http.get("/health", headers={"x-request-id": "not fit"})
    (request_id,) = replaced.headers.get_list("x-request-id")
    assert request_id.isalnum()


def _streams(gateway: Deployed) -> None:
    fields = {"prompt": "hello", "max_tokens": 8, "seed": 1}
    whole = gateway.http.post("/v1/completions", json=fields).json()
    with gateway.http.stream("POST", "/v1/completions", json={**fields, "stream": True}) as answer:
        text = "".join(answer.iter_text())
    parts = by_choice(parse_events(text))[0]
    assert "".join(part["text"] for part in parts) == whole["choices"][0]["text"]


def _answers_over_grpc(gateway: Deployed) -> None:
    with grpc.insecure_channel(gateway.grpc_target) as channel:
        message = pb.GenerateRequest(text="hello")
        message.sampling_params.max_tokens = 4
        answer = InferenceStub(channel).Generate(message, timeout=LIMIT_S)
        assert answer.usage.completion_tokens == 4


def _refuses_bad_input(gateway: Deployed) -> None:
    refused = [
        (gateway.http.get("/nope"), 404, "not_found"),
        (gateway.http.get("/v1/completions"), 405, "method_not_allowed"),
        (gateway.http.post("/v1/completions", content=b"{"), 400, "json_invalid"),
        (
            gateway.http.post("/v1/completions", json={"prompt": "x" * 10_000_000}),
            *(413, "request_too_large"),
        ),
    ]
    for response, status, code in refused:
        assert response.status_code == status
        assert response.json()["error"]["code"] == code

    head = (
        f"POST {PREFIX}/v1/completions HTTP/1.1\r\nhost: test\r\nexpect: 100-continue\r\n"
        "content-type: application/json\r\ncontent-length: 9000000\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=LIMIT_S) as client:
        client.sendall(head.encode())
        received = b"".join(iter(lambda: client.recv(4096), b""))
    # a busy machine takes longer than the proxy waits
    assert received.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").startswith(b"HTTP/1.1 413")


def _notices_clients_that_leave(gateway: Deployed) -> None:
    gateway.engine.step_s = 0.1
    for stream in (True, False):
        body = {"prompt": "x", "max_tokens": 400, "stream": stream}
        raw = json.dumps(body).encode()
        head = (
            f"POST {PREFIX}/v1/completions HTTP/1.1\r\nhost: test\r\n"
            f"content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", gateway.port), timeout=LIMIT_S) as client:
            client.sendall(head.encode() + raw)
            if stream:
                assert b"200 OK" in client.recv(4096)
            gateway.wait_for(lambda: bool(gateway.engine.running), "the request")
        gateway.wait_for(lambda: not gateway.engine.running, "the end")
        name = gateway.engine.requests[-1].request_id
        assert gateway.engine.aborts[-1] == (name, ())
    gateway.engine.step_s = 0.0


def _reports_the_cluster(gateway: Deployed) -> None:
    described = gateway.http.get("/openapi.json").json()
    assert described["servers"] == [{"url": PREFIX}]
    status = gateway.http.get("/cluster/v1/status").json()
    (entry,) = status["gateway"]
    assert entry["grpc"] == gateway.grpc_target
    assert entry["http"] == f"127.0.0.1:{gateway.port}"
    assert entry["pid"]
    assert gateway.http.get("/cluster/v1/placement").json()["banks"]
    metrics = gateway.http.get("/metrics").text
    assert 'route="/v1/completions"' in metrics
    assert "expertmesh:expert_worker_up" in metrics
    assert "expertmesh:client_disconnects_total" in metrics


def _ends(gateway: Deployed) -> None:
    serve.delete(APP_NAME)
    host, port = gateway.grpc_target.split(":")
    with pytest.raises(OSError):
        socket.create_connection((host, int(port)), timeout=1.0).close()
    url = f"http://127.0.0.1:{gateway.port}/-/routes"
    gateway.wait_for(lambda: httpx.get(url, timeout=LIMIT_S).json() == {}, "the proxy to know it")
    for path in ("/health", "/v1/models"):
        response = gateway.http.get(path, headers={"x-request-id": "mine"})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "not_ready"
        assert response.headers["retry-after-ms"] == "1000"
        assert response.headers.get_list("x-request-id") == ["mine"]
