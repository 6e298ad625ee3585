"""``node``: the ``ray start`` that it becomes, and its token."""

from __future__ import annotations

import argparse
import stat
from pathlib import Path

import pytest

from cluster.cli.cluster.node import node_environment, ray_start, redis_password
from cluster.cli.main import make_parser
from cluster.cli.terminal.exit_codes import CommandError, ExitCode


def parse(*words: str) -> argparse.Namespace:
    return make_parser().parse_args(["node", *words])


def options(*words: str) -> list[str]:
    """What comes after ``ray start``."""
    command = ray_start(parse(*words))
    return command[command.index("start") + 1 :]


def test_a_head_and_a_host_that_joins_it() -> None:
    head = options("--head", "--node-ip", "10.0.0.1", "--num-cpus", "0")
    assert head[0] == "--head"
    assert {"--port=6379", "--node-ip-address=10.0.0.1", "--num-cpus=0", "--block"} <= set(head)
    assert not any(word.startswith(("--labels", "--address")) for word in head)
    other = options("--join", "10.0.0.1", "--num-gpus", "8", "--background")
    assert {"--address=10.0.0.1:6379", "--num-gpus=8"} <= set(other)
    assert "--block" not in other
    assert "--address=h:7000" in options("--join", "h:7000")


def test_what_a_host_is_for_becomes_its_labels() -> None:
    words = ["--role", "expert", "--failure-domain", "rack-7", "--device-speed", "0.5"]
    labels = "expertmesh/role=expert,expertmesh/failure-domain=rack-7,expertmesh/device-speed=0.5"
    assert f"--labels={labels}" in options("--join", "h", *words)
    with pytest.raises(SystemExit):
        parse("--join", "h", "--role", "experts")
    with pytest.raises(SystemExit):
        parse("--join", "h", "--head")


def test_the_head_makes_a_token_that_only_its_user_reads(
    state_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = node_environment(parse("--head"), {})
    path = Path(environment["RAY_AUTH_TOKEN_PATH"])
    assert path.parent == state_home / "expertmesh"
    assert environment["RAY_AUTH_MODE"] == "token"
    assert len(path.read_text()) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert str(path) in capsys.readouterr().err
    text = path.read_text()
    assert node_environment(parse("--head"), {})["RAY_AUTH_TOKEN_PATH"] == str(path)
    assert path.read_text() == text
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("state_home")
def test_a_joining_node_must_have_the_token(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="copy the head's token there") as caught:
        node_environment(parse("--join", "h"), {})
    assert caught.value.code == ExitCode.REFUSED
    token = tmp_path / "t"
    token.write_text("x")
    for words, given in (
        (["--token-file", str(token)], {}),
        ([], {"RAY_AUTH_TOKEN_PATH": str(token)}),
    ):
        environment = node_environment(parse("--join", "h", *words), given)
        assert environment["RAY_AUTH_TOKEN_PATH"] == str(token)
    given = {"RAY_AUTH_TOKEN": "secret"}
    assert node_environment(parse("--join", "h"), given)["RAY_AUTH_MODE"] == "token"


@pytest.mark.usefixtures("state_home")
def test_what_the_user_has_set_wins() -> None:
    given = {"RAY_AUTH_MODE": "disabled", "RAY_health_check_period_ms": "9"}
    environment = node_environment(parse("--head"), given)
    assert environment["RAY_AUTH_MODE"] == "disabled"
    assert environment["RAY_health_check_period_ms"] == "9"
    assert environment["RAY_health_check_failure_threshold"] == "3"
    assert environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == "120"


def test_a_password_of_redis_is_handed_to_ray() -> None:
    assert redis_password({"RAY_REDIS_PASSWORD": "secret"}) == ["--redis-password=secret"]
    assert redis_password({}) == []
