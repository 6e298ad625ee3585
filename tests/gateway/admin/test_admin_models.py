"""The admin service with two models: a call names the model whose workers it concerns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest

from gateway.admin.grpc import MODEL_HEADER
from protos import admin_pb2 as pb
from protos.admin_pb2_grpc import AdminStub
from tests.gateway.fakes import other_tokenizer
from tests.gateway.stack import MODEL, OTHER_MODEL, WAIT_S, Stack, post, running_stack


@pytest.fixture
def admin(pair: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{pair.admin.http}", timeout=WAIT_S) as client:
        yield client


@pytest.fixture
def stub(pair: Stack) -> Iterator[AdminStub]:
    with grpc.insecure_channel(pair.admin.grpc) as channel:
        yield AdminStub(channel)


def test_workers_are_those_of_the_named_model(
    pair: Stack, admin: httpx.Client, stub: AdminStub
) -> None:
    other = pair.others[OTHER_MODEL].controller
    former = other.state["workers"]
    pair.call(lambda: other.change(workers=former[:1]))
    try:
        for model, number in ((None, 3), (MODEL, 3), (OTHER_MODEL, 1)):
            query = {} if model is None else {"model": model}
            answer = admin.get("/admin/v1/workers", params=query)
            assert answer.status_code == 200, answer.text
            assert len(answer.json()["workers"]) == number
            metadata = () if model is None else ((MODEL_HEADER, model),)
            found = stub.ListWorkers(pb.ListWorkersRequest(), metadata=metadata)
            assert len(found.workers) == number
    finally:
        pair.call(lambda: other.change(workers=former))


def test_orders_reach_the_controller_of_the_named_model(
    pair: Stack, admin: httpx.Client, stub: AdminStub
) -> None:
    orders, others = pair.controller.drain_orders, pair.others[OTHER_MODEL].controller.drain_orders
    body = {"worker": "expert-1", "deadline_s": 7}
    assert admin.post("/admin/v1/drain", json=body).status_code == 200
    assert (len(orders), len(others)) == (1, 0)
    assert admin.post("/admin/v1/drain", json={**body, "model": OTHER_MODEL}).status_code == 200
    assert (len(orders), len(others)) == (1, 1)
    query = {"model": OTHER_MODEL}
    assert admin.post("/admin/v1/drain", json=body, params=query).status_code == 200
    assert (len(orders), len(others)) == (1, 2)
    metadata = ((MODEL_HEADER, OTHER_MODEL),)
    stub.DrainWorker(pb.DrainWorkerRequest(worker="expert-1"), metadata=metadata)
    assert (len(orders), len(others)) == (1, 3)
    assert {order["worker"] for order in others} == {"expert-1"}


def test_the_query_wins_over_the_body(pair: Stack, admin: httpx.Client) -> None:
    body = {"worker": "expert-1", "model": MODEL}
    admin.post("/admin/v1/drain", json=body, params={"model": OTHER_MODEL})
    assert not pair.controller.drain_orders
    assert len(pair.others[OTHER_MODEL].controller.drain_orders) == 1


def test_events_are_streamed_from_the_named_model(pair: Stack, stub: AdminStub) -> None:
    other = pair.others[OTHER_MODEL].controller
    former = other.state["history"]
    event = {"generation": 9, "time": 0.0, "cause": "only there", "effect": "SERVING"}
    pair.call(lambda: other.change(history=[event]))
    try:
        causes = []
        for metadata in ((), ((MODEL_HEADER, OTHER_MODEL),)):
            events: Any = stub.WatchCluster(pb.WatchClusterRequest(), metadata=metadata)
            causes.append(next(events).cause)
            events.cancel()
        assert causes == ["start", "only there"]
    finally:
        pair.call(lambda: other.change(history=former))


def test_unknown_models_are_refused(admin: httpx.Client, stub: AdminStub) -> None:
    for answer in (
        admin.get("/admin/v1/workers", params={"model": "third"}),
        admin.post("/admin/v1/drain", json={"worker": "expert-1", "model": "third"}),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    with pytest.raises(grpc.RpcError) as caught:
        stub.ListWorkers(pb.ListWorkersRequest(), metadata=((MODEL_HEADER, "third"),))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("model", [1, ["other"], {"name": "other"}, True])
def test_a_model_must_be_a_text(pair: Stack, admin: httpx.Client, model: object) -> None:
    answer = admin.post("/admin/v1/drain", json={"worker": "expert-1", "model": model})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
    assert not pair.controller.drain_orders


def test_adapters_belong_to_the_named_model() -> None:
    with (
        running_stack(more_models={OTHER_MODEL: other_tokenizer()}) as stack,
        httpx.Client(base_url=f"http://{stack.admin.http}", timeout=WAIT_S) as admin,
    ):
        other = stack.others[OTHER_MODEL]
        order = {"lora_name": "sql", "lora_path": "/adapters/sql", "model": OTHER_MODEL}
        assert admin.post("/v1/load_lora_adapter", json=order).status_code == 200
        models = stack.http.get("/v1/models").json()["data"]
        assert [(model["id"], model["parent"]) for model in models] == [
            (MODEL, None),
            (OTHER_MODEL, None),
            ("sql", OTHER_MODEL),
        ]
        assert post(stack, "/v1/completions", model="sql", prompt=[65], max_tokens=1).is_success
        assert [request.adapter for request in other.engine.requests] == ["sql@0"]
        assert not stack.engine.requests
        gone = admin.post("/v1/unload_lora_adapter", json={"lora_name": "sql"})
        assert gone.status_code == 404, "the first model has no such adapter"
        named = {"lora_name": "sql", "model": OTHER_MODEL}
        assert admin.post("/v1/unload_lora_adapter", json=named).status_code == 200
        assert post(stack, "/v1/completions", model="sql", prompt=[65]).status_code == 404
