from __future__ import annotations

import stat
from pathlib import Path

import pytest

from cluster.local_ray import make_temp_dir, private_environment, remove


def test_the_folder_is_private_short_and_new() -> None:
    one, two = make_temp_dir(), make_temp_dir()
    try:
        assert one != two
        assert stat.S_IMODE(one.stat().st_mode) == 0o700
        session = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
        assert len(str(one / "ray" / session)) <= 107
    finally:
        remove(one)
        remove(two)


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
