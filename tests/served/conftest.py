from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from benchmarks.harness.server import GOOD, Served, running_server
from protos.inference_pb2_grpc import InferenceStub


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One ``expertmesh serve`` for all tests of this folder; requests do not affect each other."""
    with running_server(tmp_path_factory.mktemp("state"), "--deterministic") as server:
        yield server
        server.wait_idle()


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
