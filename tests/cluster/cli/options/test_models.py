"""The list ``models`` in the file of ``--config``: several models, each with its options."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli.main import main, make_parser
from cluster.cli.options.config_file import MAX_MODELS
from cluster.cli.options.serve_config import build_configs, options_by_flag
from cluster.cli.options.serve_options import GivenOptions, read_given_options
from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.config.cluster import ClusterConfig
from cluster.launch.model_source import ModelSource
from cluster.launch.plan import option_differences

TEXT = """
num-expert-workers: 2
dtype: float32
port: 8001
models:
  - model: /models/small
    num-expert-workers: 4
    served_model_name: little
  - model: /models/large
    mode: colocated
"""


def given(
    folder: Path, text: str, *words: str, environment: dict[str, str] | None = None
) -> GivenOptions:
    path = folder / "models.yaml"
    path.write_text(text)
    args = make_parser().parse_args(["up", "--config", str(path), *words])
    return read_given_options(args, environment or {})


def configs(folder: Path, text: str, *words: str) -> list[ClusterConfig]:
    models = given(folder, text, *words).models
    names = [Path(str(model.model.value)) for model in models]
    return build_configs(models, [ModelSource(folder=path, name=path.name) for path in names])


def refusal(folder: Path, text: str, *words: str, **environment: str) -> str:
    with pytest.raises(CommandError) as caught:
        given(folder, text, *words, environment=environment)
    assert caught.value.code == ExitCode.USAGE
    return str(caught.value)


def test_each_entry_is_a_model_with_the_shared_options_and_its_own(tmp_path: Path) -> None:
    found = given(tmp_path, TEXT)
    assert found.values == {
        "workers.num_expert_workers": 2,
        "model.dtype": "float32",
        "gateway.port": 8001,
    }
    first, second = found.models
    assert (first.model.value, second.model.value) == ("/models/small", "/models/large")
    assert first.model.origin == f"models[0] in {tmp_path}/models.yaml"
    assert first.values == {
        **found.values,
        "workers.num_expert_workers": 4,
        "model.served_model_name": "little",
    }
    assert second.values == {**found.values, "workers.mode": "colocated"}


def test_one_model_in_the_list_is_a_model(tmp_path: Path) -> None:
    (model,) = given(tmp_path, "models: [{model: /models/small, mode: local}]").models
    assert (model.model.value, model.values) == ("/models/small", {"workers.mode": "local"})


def test_without_the_list_there_is_one_model(tmp_path: Path) -> None:
    found = given(tmp_path, "model: /models/small\nmode: local")
    (model,) = found.models
    assert (model.model.value, model.values) == ("/models/small", found.values)


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (("--num-expert-workers", "6"), {}),
        ((), {"EXPERTMESH_NUM_EXPERT_WORKERS": "6"}),
    ],
)
def test_an_entry_wins_over_flags_and_variables_which_win_over_shared_values(
    tmp_path: Path, words: Sequence[str], environment: dict[str, str]
) -> None:
    found = given(tmp_path, TEXT, *words, environment=environment)
    numbers = [model.values["workers.num_expert_workers"] for model in found.models]
    assert (found.values["workers.num_expert_workers"], numbers) == (6, [4, 6])


def test_keys_hold_for_all_models(tmp_path: Path) -> None:
    found = given(tmp_path, TEXT, "--api-key", "secret")
    hashes = {model.values["gateway.api_keys"] for model in found.models}
    assert hashes == {found.values["gateway.api_keys"]}


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("models: /models/small", f"models must be a list of 1 to {MAX_MODELS} models"),
        ("models: []", f"models must be a list of 1 to {MAX_MODELS} models"),
        ("models: {model: a}", f"models must be a list of 1 to {MAX_MODELS} models"),
        ("model: a\nmodels: [{model: b}]", "model and models exclude each other"),
        ("models: [{model: a}, b]", r"models\[1\] must have a model"),
        ("models: [{model: a}, null]", r"models\[1\] must have a model"),
        ("models: [{model: a}, {mode: local}]", r"models\[1\] must have a model"),
        ("models: [{model: ''}]", r"models\[0\] must have a model"),
        ("models: [{model: [a]}]", r"models\[0\]: model must have one value"),
        ("models: [{model: a}, {model: b, mode: [x]}]", r"models\[1\]: mode must have one value"),
        ("models: [{model: a, speed: 3}]", r"models\[0\]: speed is not an option of serve"),
        (
            "models: [{model: a, num-expert-wrkers: 3}]",
            r"models\[0\]: num-expert-wrkers is not an option of serve.*num-expert-workers",
        ),
        (
            "models: [{model: a}, {model: b, mode: fast}]",
            r"mode in models\[1\] in .*models.yaml \(fast\) must be one of",
        ),
        (
            "models: [{model: a, num-expert-workers: x}]",
            r"num-expert-workers in models\[0\] in .* \(x\) must be",
        ),
        ("models: [{model: a, models: [{model: b}]}]", r"models\[0\]: models is not an option"),
    ],
)
def test_errors_name_the_entry(tmp_path: Path, text: str, rule: str) -> None:
    assert re.search(rule, refusal(tmp_path, text))


@pytest.mark.parametrize(
    "option", ["port", "api-key-file", "metrics_prefix", "log-format", "trace-dir", "wait-nodes"]
)
def test_options_that_hold_for_all_models_are_refused_in_an_entry(
    tmp_path: Path, option: str
) -> None:
    text = refusal(tmp_path, f"models: [{{model: a}}, {{model: b, {option}: 1}}]")
    assert f"models[1]: {option} holds for all models, outside the list" in text


def test_the_number_of_models_is_limited(tmp_path: Path) -> None:
    entries = [{"model": f"/models/m{number}"} for number in range(MAX_MODELS + 1)]
    assert "models must be a list of 1 to 64 models" in refusal(
        tmp_path, yaml.safe_dump({"models": entries})
    )
    assert len(given(tmp_path, yaml.safe_dump({"models": entries[1:]})).models) == MAX_MODELS


def test_another_model_beside_the_list_is_refused(tmp_path: Path) -> None:
    path = f"models in {tmp_path}/models.yaml exclude each other"
    assert refusal(tmp_path, TEXT, "/models/third") == f"MODEL (/models/third) and {path}"
    found = refusal(tmp_path, TEXT, EXPERTMESH_MODEL="/models/third")
    assert found == f"EXPERTMESH_MODEL (/models/third) and {path}"


# ---- configurations -----------------------------------------------------------------------


def test_one_model_is_configured_as_without_the_list(tmp_path: Path) -> None:
    (config,) = configs(tmp_path, "models: [{model: /models/small}]")
    assert (config.fleet, config.workers.other_pools) == ("", ())
    assert config.process_name("expert-0") == "expert-0"


def test_each_model_has_a_fleet_and_knows_the_workers_of_the_others(tmp_path: Path) -> None:
    text = """
    models:
      - {model: /models/a, num-attention-workers: 2, num-expert-workers: 3}
      - {model: /models/b, mode: colocated, num-expert-workers: 4}
      - {model: /models/c, mode: local}
    """
    found = configs(tmp_path, text)
    assert [config.fleet for config in found] == ["", "model-1", "model-2"]
    assert [config.namespace for config in found] == [
        "expertmesh",
        "expertmesh.model-1",
        "expertmesh.model-2",
    ]
    assert [config.model.served_model_name for config in found] == ["a", "b", "c"]
    assert [config.process_name("expert-0") for config in found] == [
        "expert-0",
        "expert-0@b",
        "expert-0@c",
    ]
    pools = [dict(config.workers.pools) for config in found]
    for place, config in enumerate(found):
        expected: dict[str, int] = {}
        for other in (*pools[:place], *pools[place + 1 :]):
            for role, number in other.items():
                expected[role] = expected.get(role, 0) + number
        assert dict(config.workers.other_pools) == expected
    assert dict(found[1].workers.other_pools) == {"attention": 3, "expert": 3}


def test_configurations_survive_the_way_to_their_processes(tmp_path: Path) -> None:
    for config in configs(tmp_path, TEXT):
        plain = json.loads(json.dumps(config.to_dict()))
        assert ClusterConfig.from_dict(plain) == config


def test_further_models_have_folders_of_their_own(tmp_path: Path) -> None:
    disk, traces = tmp_path / "kv", tmp_path / "traces"
    text = f"""
    kv-host-bytes: 1G
    kv-disk-dir: {disk}
    kv-disk-bytes: 1G
    trace-dir: {traces}
    models: [{{model: /models/a}}, {{model: /models/b}}, {{model: /models/c, kv-disk-dir: /c}}]
    """
    found = configs(tmp_path, text)
    assert [config.kv_tiers.kv_disk_dir for config in found] == [
        str(disk),
        str(disk / "model-1"),
        "/c/model-2",
    ]
    assert [config.observability.trace_dir for config in found] == [
        str(traces),
        str(traces / "model-1"),
        str(traces / "model-2"),
    ]


@pytest.mark.parametrize(
    ("entries", "rule"),
    [
        ("{model: /x/m}, {model: /y/m}", r"^served_model_name \(m\) must be another name"),
        (
            "{model: a, served-model-name: n}, {model: b, served-model-name: n}",
            r"^served_model_name \(n\) must be another name for each model and adapter",
        ),
        (
            "{model: a, lora-modules: sql=/x}, {model: b, lora-modules: sql=/y}",
            r"^lora_modules \(sql\) must be another name",
        ),
        (
            "{model: a, lora-modules: b=/x}, {model: b}",
            r"^served_model_name \(b\) must be another name",
        ),
        (
            "{model: a}, {model: b, lora-modules: a=/x}",
            r"^lora_modules \(a\) must be another name",
        ),
        (
            "{model: a, kv-events-endpoint: 'tcp://*:5557'}, "
            "{model: b, kv-events-endpoint: 'tcp://*:5557'}",
            r"^kv_events_endpoint \(tcp://\*:5557\) must be another one for each model: b has it",
        ),
    ],
)
def test_models_that_cannot_be_served_together_are_refused(
    tmp_path: Path, entries: str, rule: str
) -> None:
    with pytest.raises(CommandError, match=rule) as caught:
        configs(tmp_path, f"models: [{entries}]")
    assert caught.value.code == ExitCode.USAGE


def test_models_with_endpoints_of_their_own_are_served_together(tmp_path: Path) -> None:
    text = """
    models:
      - {model: a, kv-events-endpoint: "tcp://*:5557"}
      - {model: b, kv-events-endpoint: "tcp://*:6557"}
    """
    endpoints = [config.kv_events.kv_events_endpoint for config in configs(tmp_path, text)]
    assert endpoints == ["tcp://*:5557", "tcp://*:6557"]


# ---- comparing two starts -----------------------------------------------------------------


def test_differences_of_two_starts_name_the_entry(tmp_path: Path) -> None:
    asked = options_by_flag(given(tmp_path, TEXT))
    assert asked == {
        "--num-expert-workers": "2",
        "--dtype": "float32",
        "--port": "8001",
        "models[0]": "MODEL /models/small --served-model-name little --num-expert-workers 4",
        "models[1]": "MODEL /models/large --mode colocated",
    }
    assert option_differences(asked, options_by_flag(given(tmp_path, TEXT))) == []
    other = options_by_flag(given(tmp_path, TEXT.replace("colocated", "local")))
    assert option_differences(asked, other) == [
        "models[1]: MODEL /models/large --mode colocated, not MODEL /models/large --mode local"
    ]
    fewer = options_by_flag(given(tmp_path, "models: [{model: a}, {model: b}, {model: c}]"))
    assert any(
        line.startswith("models[2]: default, not") for line in option_differences(asked, fewer)
    )


def test_a_secret_is_a_fingerprint(tmp_path: Path) -> None:
    assert "s3cret" not in str(options_by_flag(given(tmp_path, TEXT, "--api-key", "s3cret")))


# ---- the command config -------------------------------------------------------------------


def shown(capsys: pytest.CaptureFixture[str], folder: Path, text: str, *words: str) -> str:
    path = folder / "models.yaml"
    path.write_text(text)
    assert main(["config", "--config", str(path), *words]) == ExitCode.OK
    return capsys.readouterr().out


def test_the_printed_values_are_a_file_of_the_same_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, tmp_path, TEXT)
    document = yaml.safe_load(text)
    assert document["models"] == [
        {"model": "/models/small", "served-model-name": "little", "num-expert-workers": 4},
        {"model": "/models/large", "mode": "colocated"},
    ]
    assert (document["port"], document["num-expert-workers"]) == (8001, 2)
    assert "model" not in document
    assert shown(capsys, tmp_path, text) == text
    again = given(tmp_path, text)
    assert [model.values["workers.num_expert_workers"] for model in again.models] == [4, 2]


def test_json_has_the_options_of_each_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document: dict[str, Any] = json.loads(shown(capsys, tmp_path, TEXT, "--json"))
    assert all(option["option"] != "model" for option in document["options"])
    origins = [f"models[{place}] in {tmp_path}/models.yaml" for place in (0, 1)]
    assert document["models"][1] == [
        {"option": "model", "value": "/models/large", "origin": origins[1]},
        {"option": "mode", "value": "colocated", "origin": origins[1]},
    ]
    first = {one["option"]: (one["value"], one["origin"]) for one in document["models"][0]}
    assert first["num-expert-workers"] == (4, origins[0])
    one = json.loads(shown(capsys, tmp_path, "models: [{model: a}]", "--json"))
    assert "models" not in one
    assert one["options"][0]["value"] == "a"


def test_each_value_of_an_entry_has_its_origin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, tmp_path, TEXT, "--show-origin", "--dtype", "bfloat16")
    path = re.escape(f"{tmp_path}/models.yaml")
    for line in (
        rf"model +/models/small +models\[0\] in {path}",
        rf"num-expert-workers +4 +models\[0\] in {path}",
        rf"num-expert-workers +2 +{path}",
        rf"mode +colocated +models\[1\] in {path}",
        r"dtype +bfloat16 +--dtype",
    ):
        assert re.search(rf"^{line}$", text, re.M), line


def test_values_of_an_entry_that_serve_would_refuse_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "models.yaml"
    path.write_text("models: [{model: a}, {model: b, num-expert-workers: 0}]")
    assert main(["config", "--config", str(path)]) == ExitCode.USAGE
    assert "num-expert-workers" in capsys.readouterr().err
