"""What a client's key shows of the cluster, where keys are configured: nothing by expert."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.config.gateway import GatewaySection
from gateway.auth.auth import make_key_rings
from gateway.cluster.client_view import client_families
from gateway.core.tuning import GatewayTuning
from gateway.observability.cluster_metrics import WORKER_TEXTS
from protos import admin_pb2 as pb
from protos.admin_pb2_grpc import AdminStub
from tests.gateway.stack import WAIT_S, Stack, running_stack

pytestmark = pytest.mark.heavy

CLIENT = {"authorization": "Bearer secret"}
ROOT = {"authorization": "Bearer root"}
BY_EXPERT = ("/cluster/v1/load", "/cluster/v1/placement", "/dashboard/api/load")
PATH = "/models/of-ours"
ADDRESSES = {
    "pid": 4321,
    "http": "10.9.8.7:8000",
    "grpc": "10.9.8.7:50051",
    "admin_http": "10.9.8.7:8001",
    "admin_grpc": "10.9.8.7:50052",
}
SECRETS = ("10.9.8.7", "4321", PATH, "host-b", "engine_address", "node", "pid", "path")
"""Nothing that a client's key shows contains these."""


def prepare(stack: Stack) -> None:
    """Give the cluster what must not be shown."""
    stack.gateway.status.addresses = dict(ADDRESSES)
    problem = f"the disk of {PATH} on 10.9.8.7 is nearly full"
    history = [{"generation": 1, "time": 0.0, "cause": "node 10.9.8.7", "effect": problem}]
    adapters = [{"name": "a", "key": "a@0", "path": PATH, "state": "READY"}]
    model = {"name": "tiny", "path": PATH, "max_model_len": 99, "vocab_size": 300}
    change = {"problems": [problem], "history": history, "adapters": adapters, "model": model}
    stack.call(lambda: stack.controller.change(error=problem, **change))


@pytest.fixture(scope="module")
def keyed() -> Iterator[Stack]:
    section = GatewaySection(api_keys=("secret",), admin_keys=("root",), request_timeout_s=WAIT_S)
    with running_stack(section, tuning=GatewayTuning(numbers_age_s=0.001)) as stack:
        prepare(stack)
        yield stack


@pytest.fixture(scope="module")
def without_admin() -> Iterator[Stack]:
    """Its client's key opens the admin ports, too."""
    section = GatewaySection(api_keys=("secret",), request_timeout_s=WAIT_S)
    with running_stack(section) as stack:
        prepare(stack)
        yield stack


@pytest.mark.parametrize("path", [*BY_EXPERT, "/cluster/v1/events"])
def test_a_client_is_refused_what_an_operator_sees(keyed: Stack, path: str) -> None:
    refused = keyed.http.get(path, headers=CLIENT)
    assert refused.status_code == 403
    assert refused.json()["error"]["code"] == "permission_denied"
    assert "admin key" in refused.json()["error"]["message"]
    assert keyed.http.get(path, headers=ROOT).status_code == 200


def test_numbers_for_an_operator_are_exact(keyed: Stack) -> None:
    for path, ask in (
        ("/cluster/v1/load", keyed.controller.load),
        ("/cluster/v1/placement", keyed.controller.placement),
    ):
        assert keyed.http.get(path, headers=ROOT).json() == keyed.run(ask())


def test_the_status_for_a_client_has_no_hosts_processes_and_paths(keyed: Stack) -> None:
    answer = keyed.http.get("/cluster/v1/status", headers=CLIENT)
    assert not [secret for secret in SECRETS if secret in answer.text]
    status = answer.json()
    assert (status["state"], status["is_partial"]) == ("SERVING", True)
    assert status["model"] == {"name": "tiny", "max_model_len": 99, "vocab_size": 300}
    assert status["adapters"] == [{"name": "a", "state": "READY"}]
    assert status["gateway"] == [{"name": "gateway-test", "grpc_port": 50051}]
    names = [(worker["name"], worker["role"], worker["state"]) for worker in status["workers"]]
    assert ("expert-0", "expert", "SERVING") in names
    stats = {worker["name"]: worker["stats"] for worker in status["workers"]}
    assert stats["expert-0"] == {}
    assert stats[keyed.engine.name] == {"num_requests_running": 1.0}
    whole = keyed.http.get("/cluster/v1/status", headers=ROOT).json()
    assert "is_partial" not in whole
    assert whole["gateway"] == [{"name": "gateway-test", **ADDRESSES}]
    assert whole["workers"][-1]["pid"] == 201


def labels_of(text: str) -> set[str]:
    families = text_string_to_metric_families(text)
    return {name for family in families for sample in family.samples for name in sample.labels}


@pytest.mark.parametrize("headers", [CLIENT, ROOT], ids=["client", "operator"])
def test_metrics_by_expert_are_the_operator_s(keyed: Stack, headers: dict[str, str]) -> None:
    text = keyed.http.get("/metrics", headers=headers).text
    by_expert = ("expert_tokens_total", "expert_replicas", "expert_load_balancedness_achieved")
    found = [name for name in (*by_expert, "expert_worker_tokens_total") if name in text]
    has_labels = {"layer", "expert", "bank"} & labels_of(text)
    if headers is ROOT:
        assert len(found) == 4
        assert has_labels == {"layer", "expert", "bank"}
        assert 'node="host-b"' in text
    else:
        assert (found, has_labels) == ([], set())
        assert "host-b" not in text
        assert "\nexpertmesh:num_requests_running{" in text
        assert "\nexpertmesh:expert_worker_up{" in text


def test_metrics_without_a_key_are_those_of_a_client() -> None:
    section = GatewaySection(api_keys=("secret",), public_metrics=True, vllm_metric_names=True)
    with running_stack(section) as stack:
        stack.http.get("/v1/models", headers=CLIENT)
        text = stack.http.get("/metrics").text
    assert "expert_tokens" not in text
    assert "layer" not in labels_of(text)
    assert "\nvllm:num_requests_running{" in text


def test_every_metric_of_a_worker_is_known_to_be_open_or_not() -> None:
    """A new number that follows from routes is left out by its name, or must be added here."""
    families: Any = [{"name": name, "samples": [[name, {}, 0.0]]} for name in WORKER_TEXTS]
    hidden = WORKER_TEXTS.keys() - {family["name"] for family in client_families(families)}
    assert hidden == {
        "expert_compute_seconds",
        "expert_weights_read_bytes_total",
        "expert_worker_busy_seconds_total",
        "expert_worker_slot_seconds_total",
        "expert_worker_tokens_total",
        "dispatch_bytes_total",
        "dispatch_padding_ratio",
    }


def test_without_keys_all_is_shown(stack: Stack) -> None:
    for path in (*BY_EXPERT, "/cluster/v1/events"):
        assert stack.http.get(path).status_code == 200
    assert "pid" in stack.http.get("/cluster/v1/status").json()["workers"][0]
    assert {"layer", "expert"} <= labels_of(stack.http.get("/metrics").text)


def test_a_client_s_key_shows_no_more_on_the_admin_ports(without_admin: Stack) -> None:
    """It gives orders there, where there is no admin key."""
    url = f"http://{without_admin.admin.http}"
    for path in (
        "/admin/v1/load",
        "/admin/v1/placement",
        "/dashboard/api/load",
        "/admin/v1/log?process=expert-0",
    ):
        answer = httpx.get(f"{url}{path}", headers=CLIENT, timeout=WAIT_S)
        assert answer.status_code == 403, answer.text
    workers = httpx.get(f"{url}/admin/v1/workers", headers=CLIENT, timeout=WAIT_S).json()
    assert [(w["name"], w["pid"], w["node"]) for w in workers["workers"]][-1] == ("expert-1", 0, "")
    drained = httpx.post(
        f"{url}/admin/v1/drain", json={"worker": "expert-1"}, headers=CLIENT, timeout=WAIT_S
    )
    assert drained.status_code == 200
    given = (("authorization", "Bearer secret"),)
    with grpc.insecure_channel(without_admin.admin.grpc) as channel:
        stub = AdminStub(channel)
        calls: list[Any] = [
            lambda: stub.GetExpertLoad(pb.GetExpertLoadRequest(), metadata=given),
            lambda: stub.GetPlacement(pb.GetPlacementRequest(), metadata=given),
            lambda: stub.GetLog(pb.GetLogRequest(process="expert-0"), metadata=given),
            lambda: list(stub.WatchCluster(pb.WatchClusterRequest(), metadata=given)),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    status = without_admin.http.get("/cluster/v1/status", headers=CLIENT).json()
    assert status["gateway"] == [{"name": "gateway-test", "grpc_port": 50051, "admin_port": 8001}]


def test_a_client_s_key_sees_no_balance_in_operations(without_admin: Stack) -> None:
    """It may rebalance, and could ask for the balance as often as it wants."""
    url = f"http://{without_admin.admin.http}/admin/v1"
    with httpx.Client(headers=CLIENT, timeout=WAIT_S) as client:
        found = client.post(f"{url}/rebalance", json={"dry_run": True}).json()
        listed = client.get(f"{url}/operations").json()["operations"]
        one = client.get(f"{url}/operations/{found['id']}").json()
    for operation in (found, one, *(o for o in listed if o["kind"] == "rebalance")):
        assert operation["state"] == "SUCCEEDED"
        assert "rebalance" not in operation
        assert operation["message"] == ""


def test_a_client_s_key_lists_and_unloads_its_adapters_only(without_admin: Stack) -> None:
    theirs = {"name": "b", "key": "b@1", "path": PATH, "state": "READY", "tenants": ["acme"]}
    url, known = f"http://{without_admin.admin.http}", without_admin.gateway.cluster.snapshot
    assert known is not None
    adapters = known["adapters"]
    without_admin.call(lambda: without_admin.controller.change(adapters=[*adapters, theirs]))
    without_admin.wait_for(
        lambda: "b@1" in without_admin.gateway.model.adapters.keys, "the adapter"
    )
    with httpx.Client(base_url=url, headers=CLIENT, timeout=WAIT_S) as client:
        listed = client.get("/admin/v1/lora_adapters").json()["adapters"]
        assert [(one["lora_name"], one["lora_path"]) for one in listed] == [("a", "")]
        for name in ("b", "none"):
            answer = client.post("/v1/unload_lora_adapter", json={"lora_name": name})
            assert answer.status_code == 404
            message = answer.json()["error"]["message"]
            assert message == f"the adapter '{name}' does not exist"
    without_admin.call(lambda: without_admin.controller.change(adapters=adapters))


def test_the_reason_of_a_cluster_that_fails_is_the_operator_s(keyed: Stack) -> None:
    """Also of readiness, which needs no key."""
    keyed.call(lambda: keyed.controller.change(state="STARTING"))
    keyed.wait_for(lambda: bool(keyed.gateway.readiness.not_ready_reasons()), "the state")
    asked = {"prompt": "x", "max_tokens": 1}
    answers = [keyed.http.get("/ready")]
    answers += [
        keyed.http.post("/v1/completions", json=asked, headers=headers)
        for headers in (CLIENT, ROOT)
    ]
    keyed.call(lambda: keyed.controller.change(state="SERVING"))
    keyed.wait_for(lambda: not keyed.gateway.readiness.not_ready_reasons(), "the state")
    assert [answer.status_code for answer in answers] == [503, 503, 503]
    shown = [[secret for secret in SECRETS[:3] if secret in answer.text] for answer in answers]
    assert shown == [[], [], ["10.9.8.7", PATH]]


def test_an_admin_key_among_those_of_clients_is_an_admin_key() -> None:
    public, admin = make_key_rings(GatewaySection(api_keys=("user", "root"), admin_keys=("root",)))
    for ring in (public, admin):
        account = ring.check("Bearer root")
        assert account is not None
        assert account.is_admin
    account = public.check("Bearer user")
    assert account is not None
    assert not account.is_admin


class Counted:
    """Counts the questions of a kind."""

    def __init__(self, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
        self.numbers: dict[str, int] = {}
        for name in ("load", "placement", "numbers", "snapshot"):
            monkeypatch.setattr(stack.controller, name, self._counting(stack, name))

    def _counting(self, stack: Stack, name: str) -> Any:
        ask = getattr(stack.controller, name)

        async def counted(*details: Any) -> Any:
            self.numbers[name] = self.numbers.get(name, 0) + 1
            await asyncio.sleep(0)
            return await ask(*details)

        return counted


def test_many_questions_collect_once(monkeypatch: pytest.MonkeyPatch) -> None:
    section = GatewaySection(api_keys=("secret",), admin_keys=("root",), request_timeout_s=WAIT_S)
    with running_stack(section, tuning=GatewayTuning(numbers_age_s=3600.0)) as stack:
        counted = Counted(stack, monkeypatch)
        for _ in range(5):
            for path in ("/cluster/v1/load", "/cluster/v1/placement", "/cluster/v1/status"):
                assert stack.http.get(path, headers=ROOT).status_code == 200
            for headers in (ROOT, CLIENT):
                assert stack.http.get("/metrics", headers=headers).status_code == 200
                stack.http.get("/cluster/v1/status", headers=headers)
            with httpx.Client(base_url=f"http://{stack.admin.http}", headers=ROOT) as admin:
                assert admin.get("/admin/v1/load").status_code == 200
        # "numbers" asks the stand-in's load and snapshot itself
        assert counted.numbers == {"load": 2, "placement": 1, "numbers": 1, "snapshot": 2}
        stack.call(lambda: stack.controller.change(state="RECOVERING"))
        status = stack.http.get("/cluster/v1/status", headers=ROOT)
        stack.wait_for(lambda: stack.gateway.cluster.snapshot["state"] == "RECOVERING")  # type: ignore[index]
        status = stack.http.get("/cluster/v1/status", headers=ROOT)
        assert status.json()["state"] == "RECOVERING", "changes of the state come at once"


def test_without_keys_each_question_collects(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(stack, monkeypatch)
    for _ in range(3):
        assert stack.http.get("/cluster/v1/load").status_code == 200
        assert stack.http.get("/cluster/v1/status").status_code == 200
    assert counted.numbers == {"load": 3, "snapshot": 3}
