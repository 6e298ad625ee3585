"""The admin service: both codecs, every procedure by name, ports of its own."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import json_format
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from cluster.config.gateway import GatewaySection
from gateway.admin.calls import SERVICE, AdminCalls
from gateway.admin.http import ROUTES
from gateway.admin.revision_calls import NAMES as REVISIONS
from gateway.admin.revision_calls import RevisionCalls
from gateway.admin.service import AdminApi
from protos import admin_pb2 as pb
from protos.admin_pb2_grpc import AdminStub
from tests.gateway.stack import WAIT_S, Stack, running_stack


@pytest.fixture
def admin(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{stack.admin.http}", timeout=WAIT_S) as client:
        yield client


@pytest.fixture
def stub(stack: Stack) -> Iterator[AdminStub]:
    with grpc.insecure_channel(stack.admin.grpc) as channel:
        yield AdminStub(channel)


def refusal(call: Any) -> tuple[grpc.StatusCode, str | None]:
    """Status and words of a call that must fail."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def test_a_drain_is_ordered_and_followed_over_both(
    stack: Stack, admin: httpx.Client, stub: AdminStub
) -> None:
    body = {"worker": "expert-1", "deadline_s": 7, "request_id": "me-1", "expected_epoch": 3}
    answer = admin.post("/admin/v1/drain", json=body)
    assert answer.status_code == 200, answer.text
    assert stack.controller.drain_orders[-1] == {
        "worker": "expert-1",
        "node": "",
        "limit_s": 7.0,
        "force": False,
        "request_id": "me-1",
        "expected_epoch": 3,
    }
    operation = answer.json()
    assert operation["schema"] == 1
    assert (operation["state"], operation["target"]) == ("RUNNING", "expert-1")
    assert operation["drain"]["requests_moved"] == 3
    asked = pb.GetOperationRequest(id=operation["id"])
    same = stub.GetOperation(asked)
    as_json = json_format.MessageToDict(
        same, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    assert {"schema": 1, **as_json} == operation
    assert admin.get(f"/admin/v1/operations/{operation['id']}").json() == operation
    assert admin.get("/admin/v1/operations").json()["operations"][-1] == as_json
    assert stub.CancelOperation(pb.CancelOperationRequest(id=same.id)).state == same.CANCELLED
    cancelled = admin.post(f"/admin/v1/operations/{same.id}/cancel")
    assert cancelled.json()["state"] == "CANCELLED"


def test_a_scaling_is_ordered_over_both(stack: Stack, admin: httpx.Client, stub: AdminStub) -> None:
    body = {"attention": 2, "expert": 3, "deadline_s": 7, "request_id": "me-1"}
    found = admin.post("/admin/v1/scale", json=body).json()
    expected = {"attention": 2, "expert": 3, "limit_s": 7.0, "request_id": "me-1"}
    unset = dict.fromkeys(("prefill", "decode", "expected_epoch"))
    assert stack.controller.scale_orders[-1] == {**expected, **unset}
    assert admin.post("/admin/v1/scale", json={"prefill": 1, "decode": 2}).status_code == 200
    order = stack.controller.scale_orders[-1]
    assert (order["attention"], order["prefill"], order["decode"]) == (None, 1, 2)
    assert (found["kind"], found["state"]) == ("scale", "RUNNING")
    assert (found["scale"]["added"], found["scale"]["experts_copied"]) == (["attention-1"], 2)
    assert stub.Scale(pb.ScaleRequest(attention=0)).scale.added == ["attention-1"]
    order = stack.controller.scale_orders[-1]
    assert (order["attention"], order["expert"], order["limit_s"]) == (0, None, 300.0)
    refused = admin.post("/admin/v1/scale", json={"expert": 9})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "expert")
    assert refusal(lambda: stub.Scale(pb.ScaleRequest(expert=9))) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "expert (9) must not exceed the 8 experts of a bank",
    )
    assert admin.post("/admin/v1/scale", json={"expert": -1}).status_code == 400


def test_a_rebalancing_is_asked_for_over_both(
    stack: Stack, admin: httpx.Client, stub: AdminStub
) -> None:
    found = admin.post("/admin/v1/rebalance", json={"dry_run": True}).json()
    assert found["state"] == "SUCCEEDED"
    assert (found["rebalance"]["action"], found["rebalance"]["slots_to_move"]) == ("move", 5)
    assert stub.Rebalance(pb.RebalanceRequest(dry_run=True)).rebalance.gain_s == 2.5
    assert admin.post("/admin/v1/rebalance", json={}).status_code == 409
    code, text = refusal(lambda: stub.Rebalance(pb.RebalanceRequest()))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert text == "rebalancing is not possible: there are no spare expert slots"


def test_an_order_has_defaults(stack: Stack, stub: AdminStub) -> None:
    stub.DrainWorker(pb.DrainWorkerRequest(node="host-a", force=True))
    order = stack.controller.drain_orders[-1]
    assert (order["node"], order["limit_s"], order["force"]) == ("host-a", 120.0, True)
    assert order["expected_epoch"] is None


def test_refusals_have_their_status_over_both(
    stack: Stack, admin: httpx.Client, stub: AdminStub
) -> None:
    conflict = admin.post("/admin/v1/drain", json={"worker": "last"})
    assert (conflict.status_code, conflict.json()["error"]["type"]) == (409, "conflict_error")
    assert refusal(lambda: stub.DrainWorker(pb.DrainWorkerRequest(worker="last"))) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "last is the last attention worker",
    )
    assert admin.get("/admin/v1/operations/none").status_code == 404
    asked = pb.GetOperationRequest(id="none")
    assert refusal(lambda: stub.GetOperation(asked))[0] is grpc.StatusCode.NOT_FOUND
    for wrong in ({}, {"worker": "a", "node": "b"}, {"worker": "a", "deadline_s": -1}):
        assert admin.post("/admin/v1/drain", json=wrong).status_code == 400, wrong
        message = pb.DrainWorkerRequest(**wrong)
        code, _ = refusal(lambda message=message: stub.DrainWorker(message))
        assert code is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("expert", 10**15, "(1000000000000000) must be a whole number from 0 to 4294967295"),
        ("expert", 1.5, "(1.5) must be a whole number"),
        ("expert", True, "(True) must be a whole number"),
        ("attention", "x", "(x) must be a whole number"),
        ("deadline_s", 1e400, "(inf) must be a finite number"),
        ("deadline_s", 10**400, f"(1{'0' * 63}) must be a finite number"),
        ("deadline_s", {}, "({}) must be a finite number"),
        ("request_id", 7, "(7) must be a text"),
        ("experts", 3, "(3) is not a field: the fields are attention, expert, deadline_s"),
    ],
)
def test_a_wrong_field_is_named_with_value_and_rule(
    field: str, value: Any, rule: str, admin: httpx.Client
) -> None:
    content, headers = json.dumps({field: value}), {"content-type": "application/json"}
    answer = admin.post("/admin/v1/scale", content=content, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)
    assert answer.json()["error"]["message"].startswith(f"{field} {rule}")


@pytest.mark.parametrize(
    "body", [{"wurker": "x"}, {"worker": 7}, [1], "text"], ids=["field", "type", "list", "text"]
)
def test_bodies_that_are_no_order_are_refused(admin: httpx.Client, body: Any) -> None:
    answer = admin.post("/admin/v1/drain", json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_log_is_read_on_over_both(admin: httpx.Client, stub: AdminStub) -> None:
    answer = admin.get("/admin/v1/log?process=expert-0&after=1")
    assert answer.json() == {"schema": 1, "number": "2", "lines": ["two"]}
    found = stub.GetLog(pb.GetLogRequest(process="expert-0"))
    assert (found.number, list(found.lines)) == (2, ["one", "two"])
    assert admin.get("/admin/v1/log?process=nobody").status_code == 404


def test_a_body_of_no_declared_kind_is_refused(admin: httpx.Client) -> None:
    answer = admin.post("/admin/v1/drain", content=b'{"worker": "expert-1"}')
    assert answer.status_code == 400
    assert "content-type" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://page.example"},
        {"origin": "null"},
        {"origin": "http://["},
        {"host": "[", "sec-fetch-site": "same-origin"},
        {"host": "page.example", "origin": "http://page.example"},  # its name points to loopback
        {"host": "page.example", "sec-fetch-site": "same-origin"},
        {"origin": "http://127.0.0.1:9"},  # another server of this host
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_web_pages_give_no_orders(
    stack: Stack, admin: httpx.Client, headers: dict[str, str]
) -> None:
    before = len(stack.controller.drain_orders)
    for answer in (
        admin.post("/admin/v1/drain?worker=expert-1", headers=headers),
        admin.post("/admin/v1/drain", json={"worker": "expert-1"}, headers=headers),
        admin.get("/admin/v1/workers", headers=headers),
    ):
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "permission_denied"
    assert len(stack.controller.drain_orders) == before
    own = {"sec-fetch-site": "same-origin", "origin": f"http://{stack.admin.http}"}
    for allowed in ({"sec-fetch-site": "none"}, {"sec-fetch-site": "same-origin"}, own):
        assert admin.get("/admin/v1/workers", headers=allowed).status_code == 200
    assert admin.post("/admin/v1/drain", json={"worker": "last"}, headers=own).status_code == 409


def test_messages_that_cannot_be_decoded_are_refused(stack: Stack) -> None:
    with grpc.insecure_channel(stack.admin.grpc) as channel:
        for name in ("DrainWorker", "Rebalance", "GetOperation", "AbortRequests", "WatchCluster"):
            call: Any = channel.unary_stream(f"/{SERVICE.full_name}/{name}", bytes, bytes)
            code, words = refusal(lambda call=call: list(call(b"\xff" * 99, timeout=WAIT_S)))
            assert code is grpc.StatusCode.INVALID_ARGUMENT, name
            assert words is not None
            assert "decoded" in words


def test_every_described_procedure_exists_and_has_a_route() -> None:
    described = {method.name: method.server_streaming for method in SERVICE.methods}
    kinds = {name: RevisionCalls if name in REVISIONS else AdminCalls for name in described}
    assert all(callable(getattr(kind, name, None)) for name, kind in kinds.items())
    over_http = {name for _, _, name in ROUTES}
    assert over_http == {name for name, streams in described.items() if not streams}


def test_reads_agree_with_the_public_port(
    stack: Stack, admin: httpx.Client, stub: AdminStub
) -> None:
    public = stack.http.get("/cluster/v1/placement").json()
    placement = stub.GetPlacement(pb.GetPlacementRequest(layer=0))
    assert placement.epoch == public["epoch"]
    (bank,) = placement.banks
    maps = [list(slots.experts) for slots in bank.physical_to_logical]
    assert maps == public["banks"][0]["physical_to_logical"]
    assert not bank.balancedness.HasField("achieved")
    asked = pb.GetPlacementRequest(layer=9)
    assert refusal(lambda: stub.GetPlacement(asked))[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert admin.get("/admin/v1/placement", params={"layer": 0}).json()["epoch"] == placement.epoch
    load = stub.GetExpertLoad(pb.GetExpertLoadRequest())
    assert list(load.banks[0].load) == public["banks"][0]["load"]
    names = [w.name for w in stub.ListWorkers(pb.ListWorkersRequest()).workers]
    assert names == [w["name"] for w in stack.http.get("/cluster/v1/status").json()["workers"]]


def test_events_are_sent_as_they_happen(stack: Stack, stub: AdminStub) -> None:
    events: Any = stub.WatchCluster(pb.WatchClusterRequest())
    assert next(events).cause == "start"
    entry = {"generation": 7, "time": 5.0, "cause": "drained expert-1", "effect": "go on"}
    entry |= {"took_s": 0.25, "of_a_later_release": 1}
    history = stack.controller.state["history"]
    stack.call(lambda: stack.controller.change(history=[*history, entry]))
    event = next(events)
    assert (event.generation, event.cause, event.took_s) == (7, "drained expert-1", 0.25)
    events.cancel()
    stack.call(lambda: stack.controller.change(history=history))


def test_a_controller_that_fails_is_not_ready(stack: Stack, stub: AdminStub) -> None:
    stack.controller.error = ConnectionError("the actor died")
    code, words = refusal(lambda: stub.ListOperations(pb.ListOperationsRequest()))
    stack.controller.error = None
    assert (code, words) == (grpc.StatusCode.UNAVAILABLE, "the controller does not answer")


def test_health_and_reflection_know_the_service(stack: Stack) -> None:
    with grpc.insecure_channel(stack.admin.grpc) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        asked = health_pb2.HealthCheckRequest(service=SERVICE.full_name)
        assert health.Check(asked).status == health_pb2.HealthCheckResponse.SERVING
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection.ServerReflectionInfo(iter([request]))
        assert SERVICE.full_name in [s.name for s in answer.list_services_response.service]
        for name, is_known in (("Admin", True), ("Engine", False)):
            request.file_containing_symbol = f"expertmesh.v1.{name}"
            (answer,) = reflection.ServerReflectionInfo(iter([request]))
            assert answer.HasField("file_descriptor_response") is is_known


def test_admin_calls_are_not_on_the_public_ports(stack: Stack) -> None:
    assert stack.http.post("/admin/v1/drain", json={"worker": "expert-1"}).status_code == 404
    with grpc.insecure_channel(stack.grpc_target) as channel:
        request = pb.DrainWorkerRequest(worker="expert-1")
        code, _ = refusal(lambda: AdminStub(channel).DrainWorker(request))
        assert code is grpc.StatusCode.UNIMPLEMENTED
    assert stack.controller.drain_orders == []


def test_a_taken_usual_port_gives_way_and_a_taken_wanted_one_is_an_error(stack: Stack) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]

        async def start(section: GatewaySection) -> tuple[str, str]:
            api = AdminApi(stack.gateway, section, http_port=port, grpc_port=port)
            try:
                await api.start()
                return api.http, api.grpc
            finally:
                await api.stop()

        found = stack.run(start(GatewaySection()))
        assert str(port) not in "".join(found)
        for name in ("admin_port", "admin_grpc_port"):
            with pytest.raises(Exception, match="cannot bind"):
                stack.run(start(GatewaySection(**{name: port})))


def test_keys_guard_it() -> None:
    with running_stack(GatewaySection(api_keys=("secret",))) as stack:
        url = f"http://{stack.admin.http}"
        assert httpx.get(f"{url}/admin/v1/operations", timeout=WAIT_S).status_code == 401
        assert httpx.get(f"{url}/health", timeout=WAIT_S).status_code == 200
        headers = {"authorization": "Bearer secret"}
        assert (
            httpx.get(f"{url}/admin/v1/operations", headers=headers, timeout=WAIT_S).status_code
            == 200
        )
        with grpc.insecure_channel(stack.admin.grpc) as channel:
            stub = AdminStub(channel)
            asked = pb.ListOperationsRequest()
            assert refusal(lambda: stub.ListOperations(asked))[0] is (
                grpc.StatusCode.UNAUTHENTICATED
            )
            stub.ListOperations(asked, metadata=(("authorization", "Bearer secret"),))
