"""Text that commands read from stdin."""

from __future__ import annotations

import io
import sys

import pytest

from cluster.cli.main import main
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.cli.terminal.stdin import is_terminal
from tests.cluster.cli.fake_gateway import FakeGateway

pytestmark = pytest.mark.usefixtures("state_home")

COMMANDS = (["generate", "-"], ["tokenize", "-"], ["chat"])


@pytest.mark.parametrize("words", COMMANDS)
def test_stdin_that_is_not_text_is_refused(
    gateway: FakeGateway,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(b"a\xffb\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["--url", gateway.url, *words]) == ExitCode.USAGE
    assert "stdin is not utf-8 text" in capsys.readouterr().err
    assert not gateway.bodies


@pytest.mark.parametrize("words", COMMANDS)
def test_a_closed_stdin_is_refused(
    gateway: FakeGateway,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["--url", gateway.url, *words]) == ExitCode.USAGE
    assert "stdin is closed" in capsys.readouterr().err


def test_down_asks_nothing_if_stdin_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert not is_terminal()
