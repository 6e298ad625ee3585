"""The command ``scale`` against a server that answers like a gateway."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.cli.main import main
from cluster.cli.terminal.exit_codes import ExitCode
from tests.cluster.cli.exits import exit_code
from tests.cluster.cli.fake_gateway import FakeGateway

pytestmark = pytest.mark.usefixtures("state_home")


def operation(state: str, **values: Any) -> dict[str, Any]:
    plain = {
        "schema": 1,
        "id": "scale-1.1",
        "kind": "scale",
        "target": "2 attention and 3 expert workers",
        "state": state,
        "phase": "start workers",
        "message": "",
        "started": 100.0,
        "ended": 0.0,
    }
    return {**plain, **values}


def done() -> dict[str, Any]:
    result = {"added": ["expert-2"], "removed": [], "requests_moved": 3, "experts_copied": 0}
    text = "scaled to 2 attention and 3 expert workers"
    return operation("SUCCEEDED", message=text, ended=108.5, scale=result)


def test_it_waits_until_the_workers_serve(
    gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.open_admin()
    gateway.admin = [(200, operation("RUNNING")), (200, done())]
    words = ["--url", gateway.url, "scale", "--attention", "2", "--expert", "3"]
    assert main([*words, "--deadline", "60"]) == ExitCode.OK
    printed = capsys.readouterr()
    assert printed.err == "scale-1.1 2 attention and 3 expert workers: start workers\n"
    assert printed.out == (
        "scale-1.1 SUCCEEDED: scaled to 2 attention and 3 expert workers "
        "(3 requests moved, 8.5 s)\n"
    )
    assert gateway.admin_paths[0] == "/admin/v1/scale"
    order = gateway.bodies[0]
    assert order.pop("request_id")
    assert order == {"attention": 2, "expert": 3, "deadline_s": 60.0}


def test_one_pool_alone_can_be_scaled(gateway: FakeGateway) -> None:
    gateway.open_admin()
    gateway.admin = [(200, done())]
    assert main(["--url", gateway.url, "scale", "--expert", "3", "--json"]) == ExitCode.OK
    assert "attention" not in gateway.bodies[0]


def test_a_failed_scaling_has_its_own_exit_code(gateway: FakeGateway) -> None:
    gateway.open_admin()
    gateway.admin = [(200, operation("FAILED", message="expert-2 was lost before it served"))]
    assert main(["--url", gateway.url, "scale", "--expert", "3"]) == ExitCode.FAILED


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "one of --attention, --expert, --prefill and --decode is required"),
        (["--expert", "0"], "--expert: '0' must be a whole number from 1 to 2147483647"),
        (["--expert", "9" * 15], f"--expert: '{'9' * 15}' must be a whole number"),
        (["--expert", "2", "--deadline", "inf"], "--deadline: 'inf' must be above 0 and at most"),
    ],
)
def test_orders_without_sense_are_refused_here(
    words: list[str], text: str, gateway: FakeGateway, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code("--url", gateway.url, "scale", *words) == ExitCode.USAGE
    assert text in capsys.readouterr().err
