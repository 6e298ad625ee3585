"""The deployment for real: Ray Serve, a controller actor, a scripted engine."""

from __future__ import annotations

import contextlib
import itertools
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
from benchmarks.harness.serving_cluster import end_shared_ray
from benchmarks.harness.stalls import wait_until
from cluster.config.cluster import ClusterConfig
from cluster.config.gateway import GatewaySection
from cluster.config.model import ModelSection
from cluster.core.fleets import CONTROLLER_NAME, NAMESPACE
from cluster.launch import local_ray
from expertmesh.loop_thread import LoopThread
from gateway.app import APP_NAME, build_app
from protos import inference_pb2 as pb
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.fakes import (
    CLUSTER_TOKEN,
    FakeController,
    ScriptedEngine,
    attention_entry,
    expert_entry,
    save_tiny_tokenizer,
)
from tests.gateway.sse_client import by_choice, parse_events

pytestmark = pytest.mark.ray

LIMIT_S = 120.0
PREFIX = "/some/prefix"


class ControllerActor(FakeController):
    """The fake controller as an actor."""


class Deployed:
    """A gateway of Serve, with its own ports and behind Serve's proxy."""

    def __init__(self, engine: ScriptedEngine, controller: Any, ports: list[int]) -> None:
        self.engine = engine
        self.controller = controller
        self.port, grpc_port, self.serve_port = ports
        self.grpc_target = f"127.0.0.1:{grpc_port}"
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=LIMIT_S)
        proxied = f"http://127.0.0.1:{self.serve_port}{PREFIX}"
        self.proxied = httpx.Client(base_url=proxied, timeout=LIMIT_S)

    def wait_for(self, condition: Any, what: str) -> None:
        """Wait until it holds."""
        wait_until(condition, what)


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
        local_ray.init_ray(Path(folder), num_cpus=2)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    ports = port, grpc_port, serve_port = free_ports(3)
    config = ClusterConfig(
        model=ModelSection(
            path=str(save_tiny_tokenizer(tmp_path_factory.mktemp("c") / "checkpoint")),
            served_model_name="tiny",
        ),
        gateway=GatewaySection(port=port, grpc_port=grpc_port, request_timeout_s=LIMIT_S),
        cluster_token=CLUSTER_TOKEN,
    )
    # Ray first: it forks, which does not go with the threads of gRPC
    with _local_ray(), _running_engine() as engine:
        actor: Any = ray.remote(num_cpus=0)(ControllerActor)
        controller = actor.options(name=CONTROLLER_NAME, namespace=NAMESPACE).remote()
        options = {"host": "127.0.0.1", "port": serve_port}
        serve.start(proxy_location="HeadOnly", http_options=options)
        serve.run(build_app(config.to_dict()), name=APP_NAME, route_prefix=PREFIX)
        gateway = Deployed(engine, controller, ports)
        try:
            yield gateway
        finally:
            gateway.http.close()
            gateway.proxied.close()
            serve.shutdown()  # type: ignore[no-untyped-call]


def _serve_cluster(gateway: Deployed) -> None:
    workers = [attention_entry(gateway.engine), expert_entry(0)]
    ray.get(gateway.controller.change.remote(state="SERVING", workers=workers), timeout=LIMIT_S)
    for http in (gateway.http, gateway.proxied):
        gateway.wait_for(lambda http=http: http.get("/ready").status_code == 200, "readiness")


def test_the_gateway_from_its_start_to_its_end(deployed: Deployed) -> None:
    """One test, as a deployment is expensive: the steps are named below."""
    _is_up_before_the_cluster(deployed)
    _is_not_elsewhere(deployed)
    _serve_cluster(deployed)
    for http in (deployed.http, deployed.proxied):
        _answers_over_http(http)
        _streams(http)
        _refuses_bad_input(http)
    _replaces_ids_that_are_not_fit(deployed)
    _asks_for_no_body_that_is_too_long(deployed)
    _answers_over_grpc(deployed)
    _notices_clients_that_leave(deployed)
    _reports_the_cluster(deployed)
    _ends(deployed)


def _is_up_before_the_cluster(gateway: Deployed) -> None:
    for http in (gateway.http, gateway.proxied):
        assert http.get("/health").status_code == 200
        assert http.get("/ready").status_code == 503
    for port, prefix in ((gateway.port, "/"), (gateway.serve_port, PREFIX)):
        url = f"http://127.0.0.1:{port}/-/"
        assert httpx.get(f"{url}healthz", timeout=LIMIT_S).text == "success"
        assert httpx.get(f"{url}routes", timeout=LIMIT_S).json() == {prefix: APP_NAME}
    with grpc.insecure_channel(gateway.grpc_target) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            InferenceStub(channel).Generate(pb.GenerateRequest(text="x"), timeout=LIMIT_S)
        error: Any = caught.value
        assert error.code() is grpc.StatusCode.UNAVAILABLE


def _is_not_elsewhere(gateway: Deployed) -> None:
    response = httpx.get(f"http://127.0.0.1:{gateway.serve_port}/elsewhere", timeout=LIMIT_S)
    assert response.status_code == 404
    assert response.headers["content-type"].startswith("text/plain")


def _answers_over_http(http: httpx.Client) -> None:
    fields = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    response = http.post("/v1/chat/completions", json=fields, headers={"x-request-id": "mine"})
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 3
    assert response.headers.get_list("x-request-id") == ["mine"]
    assert response.headers["x-expertmesh-placement-epoch"] == "3"


def _replaces_ids_that_are_not_fit(gateway: Deployed) -> None:
    replaced = gateway.http.get("/health", headers={"x-request-id": "not fit"})
    (request_id,) = replaced.headers.get_list("x-request-id")
    assert request_id.isalnum()


def _streams(http: httpx.Client) -> None:
    fields = {"prompt": "hello", "max_tokens": 8, "seed": 1}
    whole = http.post("/v1/completions", json=fields).json()
    with http.stream("POST", "/v1/completions", json={**fields, "stream": True}) as answer:
        text = "".join(answer.iter_text())
    parts = by_choice(parse_events(text))[0]
    assert "".join(part["text"] for part in parts) == whole["choices"][0]["text"]


def _answers_over_grpc(gateway: Deployed) -> None:
    with grpc.insecure_channel(gateway.grpc_target) as channel:
        message = pb.GenerateRequest(text="hello")
        message.sampling_params.max_tokens = 4
        answer = InferenceStub(channel).Generate(message, timeout=LIMIT_S)
        assert answer.usage.completion_tokens == 4


def _refuses_bad_input(http: httpx.Client) -> None:
    long = {"prompt": "x" * 10_000_000}
    refused = [
        (http.get("/nope"), 404, "not_found"),
        (http.get("/v1/completions"), 405, "method_not_allowed"),
        (http.post("/v1/completions", content=b"{"), 400, "json_invalid"),
        (http.post("/v1/completions", json=long), 413, "request_too_large"),
    ]
    for response, status, code in refused:
        assert response.status_code == status
        assert response.json()["error"]["code"] == code


def _asks_for_no_body_that_is_too_long(gateway: Deployed) -> None:
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: test\r\nexpect: 100-continue\r\n"
        "content-type: application/json\r\ncontent-length: 9000000\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=LIMIT_S) as client:
        client.sendall(head.encode())
        received = b"".join(iter(lambda: client.recv(4096), b""))
    assert received.startswith(b"HTTP/1.1 413")


def _notices_clients_that_leave(gateway: Deployed) -> None:
    gateway.engine.step_s = 0.1
    ways = ((gateway.port, ""), (gateway.serve_port, PREFIX))
    for (port, prefix), stream in itertools.product(ways, (True, False)):
        body = {"prompt": "x", "max_tokens": 400, "stream": stream}
        raw = json.dumps(body).encode()
        head = (
            f"POST {prefix}/v1/completions HTTP/1.1\r\nhost: test\r\n"
            f"content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as client:
            client.sendall(head.encode() + raw)
            if stream:
                assert b"200 OK" in client.recv(4096)
            gateway.wait_for(lambda: bool(gateway.engine.running), "the request")
        gateway.wait_for(lambda: not gateway.engine.running, "the end")
        name = gateway.engine.requests[-1].request_id
        assert gateway.engine.aborts[-1] == (name, ())
    gateway.engine.step_s = 0.0


def _reports_the_cluster(gateway: Deployed) -> None:
    for http, prefix in ((gateway.http, "/"), (gateway.proxied, PREFIX)):
        assert http.get("/openapi.json").json()["servers"] == [{"url": prefix}]
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
    for closed in (int(port), gateway.port):
        with pytest.raises(OSError):
            socket.create_connection((host, closed), timeout=1.0).close()
