"""``health`` against a server that answers like a gateway."""

from __future__ import annotations

import json

import pytest

from cluster.cli.main import main
from cluster.cli.terminal.exit_codes import ExitCode
from tests.cluster.cli.fake_gateway import STATUS, FakeGateway

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


def test_an_unreachable_cluster_is_not_healthy() -> None:
    assert main(["--url", "http://127.0.0.1:1", "health"]) == ExitCode.UNREACHABLE
