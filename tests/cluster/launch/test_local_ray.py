from __future__ import annotations

import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.launch.local_ray import (
    START_ATTEMPTS,
    init_ray,
    join_ray,
    make_temp_dir,
    private_environment,
)

pytestmark = pytest.mark.heavy


def test_the_folder_is_private_short_and_new() -> None:
    one, two = make_temp_dir(), make_temp_dir()
    try:
        assert one != two
        assert stat.S_IMODE(one.stat().st_mode) == 0o700
        session = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
        assert len(str(one / "ray" / session)) <= 107
    finally:
        shutil.rmtree(one)
        shutil.rmtree(two)


def test_a_private_ray_has_a_token_of_its_own(tmp_path: Path) -> None:
    environment = private_environment(tmp_path)
    token = Path(environment["RAY_AUTH_TOKEN_PATH"])
    assert environment["RAY_AUTH_MODE"] == "token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    first = token.read_text()
    assert len(first) == 64
    private_environment(tmp_path)
    assert token.read_text() != first


def test_nothing_points_a_private_ray_to_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_NAMESPACE", "RAY_TMPDIR"):
        monkeypatch.setenv(name, "somebody else's")
    environment = private_environment(tmp_path)
    assert "somebody else's" not in environment.values()
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert environment["OMP_NUM_THREADS"] == "1"


class SlowRay:
    """Stands for ``ray.init`` on a busy machine."""

    def __init__(self, num_failures: int, reason: str) -> None:
        self.num_calls = 0
        self.started: list[subprocess.Popen[bytes]] = []
        self._num_failures = num_failures
        self._reason = reason

    def init(self, *, _temp_dir: str, **options: object) -> str:
        self.num_calls += 1
        command = [sys.executable, "-c", "import time; time.sleep(600)", f"{_temp_dir}/socket"]
        self.started.append(subprocess.Popen(command))
        if self.num_calls <= self._num_failures:
            raise Exception(self._reason)
        return "connected"

    def num_running(self) -> int:
        return sum(child.poll() is None for child in self.started)


@pytest.fixture
def slow_ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], SlowRay]]:
    made: list[SlowRay] = []

    def make(num_failures: int, reason: str) -> SlowRay:
        made.append(SlowRay(num_failures, reason))
        monkeypatch.setattr("ray.init", made[-1].init)
        return made[-1]

    yield make
    for ray in made:
        for child in ray.started:
            child.kill()
            child.wait()


@pytest.mark.parametrize(
    "reason",
    [
        "The current node timed out during startup. This could happen because",
        "Timed out waiting for file /tmp/em-1/ray/session/gcs_server_port_1",
    ],
)
def test_a_start_that_ray_gives_up_is_begun_again(
    slow_ray: Callable[[int, str], SlowRay], tmp_path: Path, reason: str
) -> None:
    ray = slow_ray(2, reason)
    assert init_ray(tmp_path / "ray", num_cpus=1) == "connected"
    assert (ray.num_calls, ray.num_running()) == (3, 1)


@pytest.mark.parametrize(
    ("reason", "num_calls"), [("timed out during startup", START_ATTEMPTS), ("no such flag", 1)]
)
def test_a_start_that_cannot_succeed_ends(
    slow_ray: Callable[[int, str], SlowRay], tmp_path: Path, reason: str, num_calls: int
) -> None:
    ray = slow_ray(9, reason)
    with pytest.raises(Exception, match=reason):
        init_ray(tmp_path / "ray", num_cpus=1)
    assert ray.num_calls == num_calls


def test_a_ray_without_a_listener_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.init", lambda **options: pytest.fail("Ray would wait for minutes"))
    with socket.socket() as taken:  # bound, so that nobody listens there
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConnectionError, match="refused"):
            join_ray(address)


def test_a_ray_whose_host_is_no_name_is_refused() -> None:
    with pytest.raises(ConnectionError, match="label empty or too long"):
        join_ray("10.0..1:6379")


def test_a_ray_that_is_being_started_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        waits: list[float] = []

        def listen_now(seconds: float) -> None:
            waits.append(seconds)
            taken.listen(1)

        context = SimpleNamespace(address_info={"gcs_address": address})
        monkeypatch.setattr("ray.init", lambda **options: context)
        assert join_ray(address, patience_s=60.0, sleep=listen_now) == address
    assert len(waits) == 1
