"""``health`` against a server that answers like a gateway, and ``scale``, which is refused."""

from __future__ import annotations

import json

import pytest

from cluster.cli.exit_codes import ExitCode
from cluster.cli.main import main
from tests.cluster.fake_gateway import STATUS, FakeGateway

pytestmark = pytest.mark.usefixtures("state_home")


def test_a_ready_cluster_is_healthy(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--url", gateway.url, "health"]) == ExitCode.OK
    gateway.ready = (503, {"ready": False, "reasons": ["no attention worker", "no experts"]})
    assert main(["--url", gateway.url, "health", "--json"]) == ExitCode.NOT_READY
    shown = capsys.readouterr().out.split("\n", 1)
    assert shown[0] == "ok"
    assert json.loads(shown[1])["reasons"] == ["no attention worker", "no experts"]


def test_a_node_is_healthy_when_its_workers_serve(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--url", gateway.url, "health", "--node", "here"]) == ExitCode.OK
    attention, expert = STATUS["workers"]
    lost = {**expert, "name": "expert-9", "state": "LOST"}
    loading = {**expert, "state": "LOADING"}
    gateway.status = (200, {**STATUS, "workers": [attention, loading, lost]})
    assert main(["--url", gateway.url, "health", "--node", "here"]) == ExitCode.NOT_READY
    gateway.status = (200, {**STATUS, "workers": [lost]})
    assert main(["--url", gateway.url, "health", "--node", "here"]) == ExitCode.NOT_READY
    assert capsys.readouterr().out.splitlines() == [
        "ok",
        "expert-0 is LOADING",
        "no worker runs on here",
    ]


def test_who_cannot_be_reached_is_not_healthy() -> None:
    assert main(["--url", "http://127.0.0.1:1", "health"]) == ExitCode.UNREACHABLE


@pytest.mark.parametrize("words", [[], ["--expert", "-1"], ["--attention", "x"]])
def test_scaling_needs_a_size(gateway: FakeGateway, words: list[str]) -> None:
    line = ["--url", gateway.url, "--admin-url", gateway.url, "scale", *words]
    if words:
        with pytest.raises(SystemExit) as ended:
            main(line)
        assert ended.value.code == ExitCode.USAGE
    else:
        assert main(line) == ExitCode.USAGE
    assert gateway.bodies == []


def test_scaling_is_refused_as_long_as_it_is_not_built(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"admin_http": gateway.url.removeprefix("http://")}
    gateway.status = (200, {**STATUS, "gateway": [entry]})
    gateway.admin = [(501, {"error": {"message": "Scale is not built yet"}})]
    assert main(["--url", gateway.url, "scale", "--expert", "3"]) == ExitCode.REFUSED
    assert "not built yet" in capsys.readouterr().err
    (body,) = gateway.bodies
    assert (body["expert"], "attention" in body) == (3, False)
