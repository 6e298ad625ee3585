"""Errors name the option, the value and the rule, whatever the command and the option."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.cli.main import make_parser
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.cli.terminal.parser import with_flags
from tests.cluster.cli.exits import exit_code

pytestmark = pytest.mark.heavy

WRONG = ("", "x?", "10s", "8Q", "1e400", "nan", "-1", "1_0", "9" * 30, "\x00")


def commands(
    parser: argparse.ArgumentParser, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    groups = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    for group in groups:
        for name, command in group.choices.items():
            yield from commands(command, (*path, name))
    if not groups:
        yield path, parser


def refusal(parser: argparse.ArgumentParser, action: argparse.Action, text: str) -> str | None:
    """The error of a value; None where it is taken."""
    try:
        parser._get_values(action, [text])
    except argparse.ArgumentError as err:
        return str(err)
    return None


@pytest.mark.parametrize(("path", "parser"), list(commands(make_parser())), ids=str)
def test_a_wrong_value_is_named_with_its_rule(
    path: tuple[str, ...], parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    for action in parser._actions:
        if action.type is None or not action.option_strings or action.type is Path:
            continue
        for text in WRONG:
            found = refusal(parser, action, text)
            assert found is None or f"{text!r} must be " in found or "choose from" in found, action
    flag = next(a for a in parser._actions if "--timeout" in a.option_strings).option_strings[0]
    with pytest.raises(SystemExit):
        parser.parse_args([flag, "10s"])
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["status", "--timeout", "inf"], "--timeout: 'inf' must be above 0 and at most 1e9"),
        (["top", "--once", "--interval", "-1"], "--interval: '-1' must be above 0"),
        (["top", "--once", "--interval", "nan"], "--interval: 'nan' must be above 0"),
        (["logs", "--tail", "-1"], "--tail: '-1' must be a whole number from 0"),
        (["load", "--top", "-1"], "--top: '-1' must be a whole number from 1"),
        (["generate", "hi", "--max-tokens", "-1"], "--max-tokens: '-1' must be a whole number"),
        (["chat", "--temperature", "nan"], "--temperature: 'nan' must be a number from 0 to 100"),
        (["chat", "hi", "--seed", "9" * 20], f"--seed: '{'9' * 20}' must be a whole number of 64"),
        (["node", "--head", "--port", "99999"], "--port: '99999' must be a port number"),
        (["node", "--head", "--num-cpus", "-1"], "--num-cpus: '-1' must be a whole number from 0"),
        (["plan", "size", "--workers", "4", "--tflops", "-1"], "--tflops: '-1' must be a number"),
        (["plan", "size", "--workers", "999"], "--workers (999) must not exceed twice"),
        (["plan", "simulate", "--devices", "2", "--trace", "/nope"], "--trace (nope) cannot be"),
        (["serve", "--num-micro-batches", "1.5"], "'1.5' must be a word or a whole number"),
        (["serve", "--dry-run", "--name", "a/b"], "--name (a/b) must be letters, digits"),
        (["status", "--url", ""], "--url () must be a URL of http or https"),
        (
            ["status", "--url", "https://a", "--ca-cert", "/nope"],
            "--ca-cert (/nope) cannot be read",
        ),
        (["status", "--url", "https://a", "--client-key", "/dev/null"], "needs --client-cert"),
        (["status", "--url", "http://a", "--api-key", "ключ"], "--api-key and --admin-key must"),
    ],
)
def test_values_that_no_command_can_use(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*words) == ExitCode.USAGE
    found = capsys.readouterr().err
    assert message in found
    assert len(found.splitlines()) <= 2


def test_the_file_of_a_variable_for_tls_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EXPERTMESH_CLIENT_CERT", "/nope")
    assert exit_code("--url", "https://a", "status") == ExitCode.USAGE
    assert "EXPERTMESH_CLIENT_CERT (/nope) cannot be read: No such" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: 99999", "port in FILE (99999) must be a port number"),
        ("max_num_seqs: -3", "max-num-seqs in FILE (-3) must be at least 1"),
        ("kv-cache-bytes: 8Q", "kv-cache-bytes in FILE (8Q) must be a number of bytes"),
        ("enable_eplb: maybe", "enable-eplb in FILE (maybe) must be true or false"),
        ("dtype: float3", "dtype in FILE (float3) must be one of auto, float32"),
        ('port: "a\n  - b: : c', "--config (FILE): cannot be read:"),
    ],
)
def test_a_value_of_the_file_is_named_with_its_key(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert exit_code("config", "--config", str(path)) == ExitCode.USAGE
    found = capsys.readouterr().err
    assert message.replace("FILE", str(path)) in found
    assert len(found.splitlines()) == 1


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("max_tokens (9) must be at most 8", "--max-tokens (9) must be at most 8"),
        ("stop must not contain an empty string", "--stop must not contain an empty string"),
        ("cache_salt (x) must be shorter", "cache_salt (x) must be shorter"),
    ],
)
def test_a_refusal_of_the_server_names_the_option(message: str, shown: str) -> None:
    assert with_flags(message, make_parser().parse_args(["generate", "hi"])) == shown


@pytest.mark.parametrize(
    "message", ["config.json: hidden_size 0 must be positive", "config.json must hold an object"]
)
def test_a_file_of_the_checkpoint_is_no_option(message: str) -> None:
    assert with_flags(message, make_parser().parse_args(["serve", "folder"])) == message
    assert with_flags("chat_template.jinja: bad", make_parser().parse_args(["serve"])) == (
        "chat_template.jinja: bad"
    )


def test_no_option_of_a_cluster_may_be_infinite(capsys: pytest.CaptureFixture[str]) -> None:
    found = dict(commands(make_parser()))[("serve",)]
    numbers = [
        action.option_strings[-1]
        for action in found._actions
        if action.type is not None
        and action.option_strings
        and refusal(found, action, "inf") is None
        and found._get_values(action, ["inf"]) == math.inf
    ]
    assert len(numbers) > 20
    for flag in numbers:
        assert exit_code("serve", "--dry-run", flag, "inf") == ExitCode.USAGE
        assert f"{flag} (inf) must " in capsys.readouterr().err


def test_ports_that_are_the_same_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--port", "7000", "--admin-port", "7000")
    assert exit_code("serve", "--dry-run", *words) == ExitCode.USAGE
    assert "--admin-port (7000) must differ from other ports" in capsys.readouterr().err
