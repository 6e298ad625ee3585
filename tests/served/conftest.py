from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from benchmarks.harness.server import GOOD, Served, running_server
from protos.inference_pb2_grpc import InferenceStub
from tests.harness.otlp_collector import Collector, running_collector

KEY, LIMITED_KEY = "counts", "limited"
HEADERS = {"authorization": f"Bearer {KEY}"}
OPERATOR = {"authorization": "Bearer root"}
NUM_PLACES = 8
"""Requests that wait at the server with keys."""
_KEYS = f"keys: [{{name: a, key: {KEY}}}, {{name: b, key: {LIMITED_KEY}, requests_per_minute: 1}}]"


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the test that kills a worker of ``keyed`` last, as the numbers of the worker vanish."""
    folder = Path(__file__).parent
    own = [item for item in items if item.path.parent == folder]
    in_order = iter(sorted(own, key=lambda item: item.path.name == "test_request_traces.py"))
    items[:] = [next(in_order) if item.path.parent == folder else item for item in items]


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One ``expertmesh serve`` for all tests of this folder; requests do not affect each other."""
    with running_server(tmp_path_factory.mktemp("state"), "--deterministic") as server:
        yield server
        server.wait_idle()


@pytest.fixture(scope="package")
def collector() -> Iterator[Collector]:
    """What the server with keys sends its spans to."""
    with running_collector() as collector:
        yield collector


@pytest.fixture(scope="package")
def keyed(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Served]:
    """One server with keys, few places in its queue, and traces; its client is the operator.

    For tests that need one of these, and for those that count all requests of a server.
    """
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "keys.yaml").write_text(_KEYS)
    words = ["--api-key-file", str(folder / "keys.yaml"), "--admin-key", "root"]
    words += ["--max-queue", str(NUM_PLACES), "--otlp-endpoint", collector.endpoint]
    with running_server(folder, *words, variables={"OTEL_BSP_SCHEDULE_DELAY": "100"}) as server:
        server.client.headers.update(OPERATOR)
        yield server


@pytest.fixture(scope="package")
def channel(server: Served) -> Iterator[grpc.Channel]:
    """A gRPC client."""
    with grpc.insecure_channel(server.grpc) as channel:
        yield channel


@pytest.fixture(scope="package")
def stub(channel: grpc.Channel) -> InferenceStub:
    """The generated client."""
    return InferenceStub(channel)


@pytest.fixture(scope="package")
def calm(server: Served) -> Any:
    """The server's answers and its workers, before the tests change anything."""
    return answer_of(server), workers_of(server)


@pytest.fixture
def unharmed(server: Served, calm: Any) -> Iterator[None]:
    """After the test no block is held, no worker was lost, and the answer is the same."""
    yield
    server.wait_idle()
    assert (answer_of(server), workers_of(server)) == calm


def answer_of(server: Served) -> Any:
    """Text and tokens of one good request."""
    return server.complete(**GOOD)["choices"]


def workers_of(server: Served) -> Any:
    """Generation, and the workers that serve in it."""
    status = server.status()
    serving = [(w["name"], w["pid"], w["state"]) for w in status["workers"]]
    return status["state"], status["generation"], len(status["history"]), serving
