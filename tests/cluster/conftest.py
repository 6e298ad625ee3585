from __future__ import annotations

import contextlib
import io
import signal
import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from cluster.launch import checkpoint_check
from tests.cluster.cli.fake_gateway import FakeGateway, fake_gateway


@pytest.fixture
def state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """State files of this test alone; signal handlers that a command installs are taken back."""
    home = tmp_path / "state"
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    for name in ("EXPERTMESH_URL", "EXPERTMESH_NAME", "EXPERTMESH_API_KEY", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield home
    for number, handler in handlers.items():
        signal.signal(number, handler)


class InProcessCheck:
    """The process of a check of a checkpoint, without a process."""

    returncode = 0

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self._words = words
        self._is_killed = False

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        output = io.StringIO()
        if self._is_killed:
            return "", ""
        with contextlib.redirect_stdout(output):
            checkpoint_check.main(self._words)
        return output.getvalue(), ""

    def kill(self) -> None:
        self._is_killed = True


@pytest.fixture
def check_in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are checked in this process, which has imported torch already."""
    monkeypatch.setattr(checkpoint_check, "_start_child", InProcessCheck)


@pytest.fixture
def gateway() -> Iterator[FakeGateway]:
    """A server that answers commands as a gateway does."""
    with fake_gateway() as running:
        yield running


@pytest.fixture
def temp_dirs(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every folder for a private Ray that is made in this test."""
    made: list[Path] = []
    make = tempfile.mkdtemp

    def make_noted(suffix: str | None = None, prefix: str | None = None, dir: str = "") -> str:
        path = make(suffix, prefix, dir or None)
        if prefix == "em-":
            made.append(Path(path))
        return path

    monkeypatch.setattr(tempfile, "mkdtemp", make_noted)
    return made


@pytest.fixture
def busy_port() -> Iterator[int]:
    """A port of the loopback interface that somebody listens on."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield int(server.getsockname()[1])


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder with a path that is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as name:
        yield Path(name)
