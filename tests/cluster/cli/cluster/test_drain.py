"""The commands ``drain`` and ``operations`` against a server that answers like a gateway."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cluster.cli.cluster.drain import drain_gateway
from cluster.cli.main import main, make_parser
from cluster.cli.terminal.admin_client import find_admin
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from tests.cluster.cli.fake_gateway import STATUS, FakeGateway

pytestmark = pytest.mark.usefixtures("state_home")


@pytest.fixture
def gateway(gateway: FakeGateway) -> FakeGateway:
    """With its admin port."""
    gateway.open_admin()
    return gateway


def operation(state: str, **values: Any) -> dict[str, Any]:
    plain = {
        "schema": 1,
        "id": "drain-1.1",
        "kind": "drain",
        "target": "attention-1",
        "state": state,
        "phase": "move requests to other workers",
        "progress": 0.4,
        "message": "",
        "started": 100.0,
        "ended": 0.0,
    }
    return {**plain, **values}


def done() -> dict[str, Any]:
    result = {"workers": ["attention-1"], "requests_moved": 3, "experts_copied": 0}
    return operation("SUCCEEDED", message="attention-1 is drained", ended=100.4, drain=result)


def test_the_admin_key_goes_to_the_admin_port_alone(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--url", gateway.url, "--api-key", "user", "operations", "get", "drain-1.1"]
    gateway.admin = [(200, done()), (200, done()), (200, done()), (200, done())]
    assert main(words) == ExitCode.OK
    assert main([*words, "--admin-key", "root"]) == ExitCode.OK
    monkeypatch.setenv("EXPERTMESH_ADMIN_KEY", "other")
    assert main(words) == ExitCode.OK
    assert main(["--admin-url", f"{gateway.url}/", "operations", "get", "drain-1.1"]) == ExitCode.OK
    pairs = ["user", "user", "user", "root", "user", "other", "other"]
    assert gateway.keys == [f"Bearer {key}" for key in pairs]


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_admin_key_has_an_exit_code(
    gateway: FakeGateway, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.admin = [(status, {"error": {"message": "not this key"}})]
    words = ["--url", gateway.url, "--admin-key", "wrong", "drain", "worker", "attention-1"]
    assert (main(words), ExitCode.UNAUTHORISED.value) == (6, 6)
    assert capsys.readouterr().err == (
        "expertmesh: not this key (--admin-key or EXPERTMESH_ADMIN_KEY gives it)\n"
    )


def test_a_drain_is_waited_for(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.admin = [(200, operation("RUNNING")), (200, operation("RUNNING")), (200, done())]
    assert (
        main(["--url", gateway.url, "drain", "worker", "attention-1", "--deadline", "9"])
        == ExitCode.OK
    )
    shown = capsys.readouterr()
    assert shown.out == ("drain-1.1 SUCCEEDED: attention-1 is drained (3 requests moved, 0.4 s)\n")
    assert shown.err == "drain-1.1 attention-1: move requests to other workers\n"
    (body,) = gateway.bodies
    assert (body["worker"], body["deadline_s"], body["force"]) == ("attention-1", 9.0, False)
    assert body["request_id"]


def test_a_node_is_drained_without_waiting(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.admin = [(200, operation("RUNNING"))]
    words = ["drain", "node", "host-b", "--force", "--wait", "0", "--json"]
    assert main(["--url", gateway.url, *words]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == operation("RUNNING")
    (body,) = gateway.bodies
    assert (body["node"], body["force"]) == ("host-b", True)
    assert "worker" not in body


def test_a_drain_that_fails(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    failed = operation("FAILED", message="could not move requests to other workers within 9 s")
    gateway.admin = [(200, failed)]
    assert main(["--url", gateway.url, "drain", "worker", "attention-1"]) == ExitCode.FAILED
    assert "FAILED: could not move requests" in capsys.readouterr().out


@pytest.mark.parametrize(("status", "words"), [(409, "is the last attention worker"), (404, "no")])
def test_a_drain_that_is_refused(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str], status: int, words: str
) -> None:
    gateway.admin = [(status, {"error": {"message": words}})]
    assert main(["--url", gateway.url, "drain", "worker", "attention-0"]) == ExitCode.REFUSED
    assert capsys.readouterr().err == f"expertmesh: {words}\n"


def test_a_drain_may_wait_for_its_turn(gateway: FakeGateway) -> None:
    busy = 409, {"error": {"message": "drain-1.1 (drain of expert-1) is under way: one operation"}}
    words = ["--url", gateway.url, "drain", "node", "10.0.0.7", "--deadline", "30"]
    gateway.admin = [busy]
    assert main(words) == ExitCode.REFUSED
    gateway.admin = [busy, busy, (200, done())]
    assert main([*words, "--in-turn"]) == ExitCode.OK
    gateway.admin = [busy] * 20
    assert main([*words, "--in-turn", "--deadline", "0.5"]) == ExitCode.REFUSED


def test_a_cluster_without_admin_port(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.status = (200, STATUS)
    assert main(["--url", gateway.url, "drain", "worker", "attention-0"]) == ExitCode.REFUSED
    assert "no admin port" in capsys.readouterr().err


def test_an_operation_is_shown_and_waited_for(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.admin = [(200, operation("RUNNING")), (200, operation("RUNNING")), (200, done())]
    assert main(["--url", gateway.url, "operations", "get", "drain-1.1"]) == ExitCode.OK
    assert "RUNNING: attention-1: move requests" in capsys.readouterr().out
    assert main(["--url", gateway.url, "operations", "wait", "drain-1.1"]) == ExitCode.OK
    assert "SUCCEEDED" in capsys.readouterr().out


def test_an_operation_that_takes_too_long(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.admin = [(200, operation("RUNNING"))] * 999
    words = ["operations", "wait", "drain-1.1", "--wait", "0.05"]
    assert main(["--url", gateway.url, *words]) == ExitCode.NOT_READY
    assert "has not ended within 0.05 s" in capsys.readouterr().err


def test_operations_are_listed(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    document = {"schema": 1, "operations": [done(), operation("RUNNING", id="drain-1.2")]}
    gateway.admin = [(200, document), (200, document)]
    words = ["--url", gateway.url, "operations", "list"]
    assert main(words) == ExitCode.OK
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["ID", "TARGET", "STATE"]
    assert [row.split()[:3] for row in rows] == [
        ["drain-1.1", "attention-1", "SUCCEEDED"],
        ["drain-1.2", "attention-1", "RUNNING"],
    ]
    assert rows[0].endswith("attention-1 is drained")
    assert rows[1].endswith("move requests to other workers")
    assert main([*words, "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == document
    assert gateway.admin_paths == ["/admin/v1/operations"] * 2


def test_an_operation_is_cancelled(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    cancelled = operation("CANCELLED", message="cancelled: requests may come again")
    gateway.admin = [(200, cancelled), (409, {"error": {"message": "drain-1.1 has ended"}})]
    words = ["--url", gateway.url, "operations", "cancel", "drain-1.1"]
    assert main(words) == ExitCode.OK
    assert "drain-1.1 CANCELLED: cancelled" in capsys.readouterr().out
    assert main(words) == ExitCode.REFUSED
    assert gateway.admin_paths == ["/admin/v1/operations/drain-1.1/cancel"] * 2


def test_an_id_stays_one_part_of_the_path(gateway: FakeGateway) -> None:
    gateway.admin = [(404, {"error": {"message": "no such operation"}})]
    words = ["--url", gateway.url, "operations", "get", "../workers?x"]
    assert main(words) == ExitCode.REFUSED
    assert gateway.admin_paths == ["/admin/v1/operations/..%2Fworkers%3Fx"]


@pytest.mark.parametrize("what", ["get", "wait", "cancel"])
def test_operations_need_an_id(what: str) -> None:
    for words in (["operations"], ["operations", what]):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == ExitCode.USAGE


def left(num_requests: int) -> tuple[int, dict[str, Any]]:
    """What a gateway answers that leaves."""
    return 200, {"schema": 1, "gateway": "gateway-1", "requests": num_requests}


def test_a_gateway_is_asked_until_it_has_nothing_left(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.admin = [left(2), left(1), left(0)]
    words = ["drain", "gateway", "--admin-url", gateway.url]
    assert drain_gateway(make_parser().parse_args(words), quiet_s=0.0) == ExitCode.OK
    assert gateway.admin == []
    assert capsys.readouterr().out == "gateway-1 serves 0 requests and rejects new ones\n"
    gateway.admin = [left(2)]
    assert main([*words, "--wait", "0"]) == ExitCode.OK
    capsys.readouterr()
    gateway.admin = [left(2)] * 999
    assert main([*words, "--wait", "0.05", "--json"]) == ExitCode.FAILED
    assert json.loads(capsys.readouterr().out)["requests"] == 2


def test_a_gateway_is_drained_by_name(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    here = gateway.url.removeprefix("http://")
    names = [
        {"name": "gateway-0", "admin_http": "127.0.0.1:1"},
        {"name": "gateway-1", "admin_http": here},
    ]
    gateway.status = (200, {**STATUS, "gateway": names})
    gateway.admin = [left(2)]
    words = ["--url", gateway.url, "drain", "gateway"]
    assert main([*words, "gateway-1", "--wait", "0"]) == ExitCode.OK
    assert gateway.admin_paths == ["/admin/v1/gateway/drain"]
    assert main([*words, "gateway-9"]) == ExitCode.REFUSED
    assert "there is no gateway-9, but gateway-0, gateway-1" in capsys.readouterr().err


def test_a_gateway_needs_its_admin_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert main(["--url", "http://127.0.0.1:1", "drain", "gateway"]) == ExitCode.UNREACHABLE


def test_worker_node_or_gateway_is_needed() -> None:
    for words in (
        ["drain"],
        ["drain", "expert-1"],
        ["drain", "worker"],
        ["drain", "node"],
        ["drain", "worker", "expert-1", "--deadline", "0"],
        ["drain", "worker", "expert-1", "--wait", "-1"],
    ):
        with pytest.raises(SystemExit) as caught:
            main(words)
        assert caught.value.code == ExitCode.USAGE


def test_orders_go_through_ray_where_no_gateway_can_be_reached(
    monkeypatch: pytest.MonkeyPatch, gateway: FakeGateway
) -> None:
    there = make_parser().parse_args(["--url", gateway.url, "drain", "worker", "expert-1"])
    nowhere = make_parser().parse_args(
        ["--url", "http://127.0.0.1:1", "drain", "worker", "expert-1"]
    )
    with pytest.raises(CommandError) as caught:
        find_admin(nowhere)
    assert caught.value.code == ExitCode.UNREACHABLE
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert find_admin(nowhere) is None
    admin = find_admin(there)
    assert admin is not None
    assert admin.url == gateway.url
    monkeypatch.setenv("EXPERTMESH_ADMIN_URL", "http://10.0.0.1:8001/")
    admin = find_admin(nowhere)
    assert admin is not None
    assert admin.url == "http://10.0.0.1:8001"
