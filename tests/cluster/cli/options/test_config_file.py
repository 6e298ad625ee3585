"""``--config FILE``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from cluster.cli.main import main, make_parser
from cluster.cli.options.serve_config import options_by_flag
from cluster.cli.options.serve_options import read_given_options
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.launch.plan import option_differences

TEXT = """
model: /models/m
num-expert-workers: 4
num_redundant_experts: 8
kv-cache-bytes: 2M
enable-eplb: true
enable-prefix-caching: false
cpus-per-worker: 0.5
"""


def values_of(
    folder: Path, text: str, *words: str, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    path = folder / "engine.yaml"
    path.write_text(text)
    args = make_parser().parse_args(["up", "--config", str(path), *words])
    given = read_given_options(args, environment or {})
    return given.values | {"MODEL": given.models[0].model.value}


def test_options_come_from_the_file(tmp_path: Path) -> None:
    assert values_of(tmp_path, TEXT) == {
        "MODEL": "/models/m",
        "workers.num_expert_workers": 4,
        "workers.num_redundant_experts": 8,
        "engine.kv_cache_bytes": 2 * 1024**2,
        "rebalance.enable_eplb": True,
        "engine.enable_prefix_caching": False,
        "workers.cpus_per_worker": 0.5,
    }
    assert values_of(tmp_path, "") == {"MODEL": None}


def test_flag_and_environment_win_over_the_file(tmp_path: Path) -> None:
    environment = {"EXPERTMESH_NUM_EXPERT_WORKERS": "5", "EXPERTMESH_CPUS_PER_WORKER": "0.25"}
    words = ["other", "--num-expert-workers", "6"]
    values = values_of(tmp_path, TEXT, *words, environment=environment)
    assert values["MODEL"] == "other"
    assert values["workers.num_expert_workers"] == 6
    assert values["workers.cpus_per_worker"] == 0.25


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num-experts: 4", "num-experts is not an option of serve"),
        ("config: other.yaml", "config is not an option"),
        ("port: many", r"port in .*engine.yaml \(many\) must be a whole number"),
        ("mode: fast", r"mode in .* \(fast\) must be one of disaggregated"),
        ("port: [1, 2]", "port must have one value"),
        ("port: null", "port must have one value"),
        ("- port", "must hold names of options"),
        ("a: b: c", "cannot be read"),
        ("served-model-name: 2024-13-45", "cannot be read: month must be"),
    ],
)
def test_errors_in_the_file_are_reported(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(CommandError, match=words) as caught:
        values_of(tmp_path, text)
    assert caught.value.code == ExitCode.USAGE


def test_a_file_that_is_not_there() -> None:
    args = make_parser().parse_args(["up", "--config", "/nowhere/engine.yaml"])
    with pytest.raises(CommandError, match="nowhere"):
        read_given_options(args, {})


def asked(*words: str) -> dict[str, str]:
    args = make_parser().parse_args(["up", *words])
    return options_by_flag(read_given_options(args, {}))


def test_differences_of_two_starts_are_named_by_flag() -> None:
    one = asked("m", "--num-expert-workers", "2", "--address", "auto", "--api-key", "secret")
    same = asked("m", "--num-expert-workers", "2", "--api-key", "secret", "--wait-nodes", "3")
    assert option_differences(one, same) == []
    assert "secret" not in str(one)
    other = asked("--num-expert-workers", "3", "--deterministic", "--api-key", "secret")
    assert option_differences(one, other) == [
        "--deterministic: default, not on",
        "--num-expert-workers: 2, not 3",
        "MODEL: m, not default",
    ]
    assert len(option_differences(one, asked("m", "--num-expert-workers", "2"))) == 1


def origins(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, tuple[Any, str]]:
    """The line of ``config`` for each option."""
    assert main(["config", "--json", *words]) == ExitCode.OK
    options = json.loads(capsys.readouterr().out)["options"]
    return {o["option"]: (o["value"], o["origin"]) for o in options}


def test_every_value_has_its_origin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text(TEXT)
    monkeypatch.setenv("EXPERTMESH_CPUS_PER_WORKER", "0.25")
    monkeypatch.setenv("EXPERTMESH_API_KEYS", "secret")
    found = origins(capsys, "--config", str(path), "--num-expert-workers", "6")
    assert found["num-expert-workers"] == (6, "--num-expert-workers")
    assert found["cpus-per-worker"] == (0.25, "EXPERTMESH_CPUS_PER_WORKER")
    assert found["num-redundant-experts"] == (8, str(path))
    assert found["model"] == ("/models/m", str(path))
    assert found["max-queue"] == (1024, "default")
    assert origins(capsys)["model"] == (None, "default: the bundled checkpoint")
    assert main(["config", "--show-origin"]) == ExitCode.OK
    shown = capsys.readouterr().out
    assert re.search(r"^cpus-per-worker +0\.25 +EXPERTMESH_CPUS_PER_WORKER$", shown, re.M)
    assert "secret" not in shown


def test_the_values_are_a_file_of_options(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "engine.yaml"
    path.write_text(TEXT)
    assert main(["config", "--config", str(path), "--api-key", "secret"]) == ExitCode.OK
    text = capsys.readouterr().out
    assert "secret" not in text
    (tmp_path / "again.yaml").write_text(text)
    assert main(["config", "--config", str(tmp_path / "again.yaml")]) == ExitCode.OK
    assert capsys.readouterr().out == text


def test_values_that_serve_would_refuse_are_refused() -> None:
    assert main(["config", "--num-expert-workers", "0"]) == ExitCode.USAGE
    assert main(["config", "--host", "0.0.0.0"]) == ExitCode.REFUSED
