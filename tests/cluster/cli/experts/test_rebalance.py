"""``rebalance``, and its part of ``status``."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.cli.main import main
from cluster.cli.terminal.exit_codes import ExitCode
from tests.cluster.cli.fake_gateway import STATUS, FakeGateway

pytestmark = pytest.mark.usefixtures("state_home")


@pytest.fixture
def gateway(gateway: FakeGateway) -> FakeGateway:
    """With its admin port."""
    gateway.open_admin()
    return gateway


def operation(state: str, message: str = "") -> dict[str, Any]:
    return {
        "schema": 1,
        "id": "rebalance-1.1",
        "kind": "rebalance",
        "target": "experts",
        "state": state,
        "phase": "stage 1: load experts (2 of 5)",
        "progress": 0.0,
        "message": message,
        "started": 100.0,
        "ended": 101.5,
        "rebalance": {"dry_run": False, "action": "move"},
    }


def test_a_rebalancing_is_waited_for(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    done = operation("SUCCEEDED", "filled 5 slots in 2 epochs")
    gateway.admin = [(200, operation("RUNNING")), (200, done)]
    assert main(["--url", gateway.url, "rebalance"]) == ExitCode.OK
    shown = capsys.readouterr()
    assert shown.out == "rebalance-1.1 SUCCEEDED: filled 5 slots in 2 epochs (1.5 s)\n"
    assert "stage 1: load experts (2 of 5)" in shown.err
    (body,) = gateway.bodies
    assert body["dry_run"] is False
    assert body["request_id"]


def test_a_dry_run_is_asked_for(gateway: FakeGateway, capsys: pytest.CaptureFixture[str]) -> None:
    gateway.admin = [(200, operation("SUCCEEDED", "nothing would be done"))]
    assert main(["--url", gateway.url, "rebalance", "--dry-run"]) == ExitCode.OK
    assert gateway.bodies[0]["dry_run"] is True
    assert "nothing would be done" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"possible": False, "reason": "there are no spare expert slots"},
            "not possible: there are",
        ),
        ({"automatic": True}, "rebalance   automatic"),
        ({}, "by command"),
        ({"automatic": True, "problem": "no placement can be planned"}, "no placement can be"),
        ({"phase": "stage 1: switch at one step"}, "stage 1: switch"),
        ({"last": {"outcome": "failed", "text": "too slow"}}, "last: failed, too slow"),
    ],
)
def test_status_says_what_rebalancing_does(
    gateway: FakeGateway,
    capsys: pytest.CaptureFixture[str],
    values: dict[str, Any],
    words: str,
) -> None:
    plain = {"automatic": False, "possible": True, "reason": "", "phase": "", "last": None}
    gateway.status = (200, {**STATUS, "rebalance": {**plain, **values}})
    assert main(["--url", gateway.url, "status"]) == ExitCode.OK
    assert words in capsys.readouterr().out
