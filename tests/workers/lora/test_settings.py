"""``adapter_config.json``: what is read, and what is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoints.adapters import CONFIG
from cluster.core.errors import CheckpointError
from workers.lora.settings import parse_settings, read_settings

MODULE = "model.layers.1.self_attn.q_proj"


def test_scale_is_alpha_over_rank() -> None:
    settings = parse_settings(CONFIG)
    assert settings.rank_of(MODULE) == 4
    assert settings.scale_of(MODULE) == 16 / 4
    assert parse_settings({**CONFIG, "use_rslora": True}).scale_of(MODULE) == 16 / math.sqrt(4)


def test_patterns_name_ends_of_modules() -> None:
    patterns = {
        "rank_pattern": {"q_proj": 8, "layers.0.self_attn.v_proj": 2},
        "alpha_pattern": {"^model.layers.1.self_attn.q_proj": 32, "layers\\.0": 1},
    }
    settings = parse_settings({**CONFIG, **patterns})
    assert settings.rank_of(MODULE) == 8
    assert settings.scale_of(MODULE) == 32 / 8
    assert settings.rank_of("model.layers.0.self_attn.v_proj") == 2
    assert settings.rank_of("model.layers.10.self_attn.v_proj") == 4
    assert settings.scale_of("model.layers.1.self_attn.v_proj") == 16 / 4


def test_least_and_largest_numbers() -> None:
    settings = parse_settings({**CONFIG, "r": 1, "lora_alpha": -1e6})
    assert settings.scale_of(MODULE) == -1e6


@pytest.mark.parametrize(("length", "shown"), [(126, "x" * 126 + '"'), (127, "x" * 124 + "...")])
def test_long_values_are_cut_in_errors(length: int, shown: str) -> None:
    """At 128 characters, quotes included."""
    with pytest.raises(CheckpointError) as found:
        parse_settings({**CONFIG, "bias": "x" * length})
    assert f'bias ("{shown}) must be' in str(found.value)


def test_targets() -> None:
    assert parse_settings(CONFIG).has_target(MODULE)
    assert not parse_settings(CONFIG).has_target("model.layers.1.self_attn.my_q_proj")
    for anything in ("all-linear", ".*(q|v)_proj", None):
        assert parse_settings({**CONFIG, "target_modules": anything}).has_target(MODULE)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"use_dora": True}, "use_dora (true) is not supported"),
        ({"bias": "all"}, "bias (\"all\") must be 'none'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out (true)"),
        ({"modules_to_save": ["lm_head"]}, 'modules_to_save (["lm_head"])'),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias (true)"),
        ({"use_qalora": True}, "use_qalora"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens ([1])"),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights ("pissa")'),
        ({"peft_type": "IA3"}, 'peft_type ("IA3") must be'),
        ({"task_type": "SEQ_CLS"}, 'task_type ("SEQ_CLS")'),
        ({"something_new": 3}, "something_new (3) is not supported"),
        ({"r": 0}, "r (0) must be an integer"),
        ({"r": True}, "r (true) must be an integer"),
        ({"lora_alpha": True}, "lora_alpha (true) must be a number"),
        ({"lora_alpha": math.nan}, "lora_alpha (NaN) must be a number"),
        ({"lora_alpha": 10**400}, "lora_alpha (1000"),
        ({"rank_pattern": {"q_.*": 3}}, 'rank_pattern ("q_.*") must name'),
        ({"rank_pattern": {"q_proj": "3"}}, "rank_pattern.q_proj"),
        ({"alpha_pattern": [1]}, "alpha_pattern ([1]) must be an object"),
        ({"target_modules": 3}, "target_modules (3)"),
        ({"use_rslora": "yes"}, 'use_rslora ("yes")'),
    ],
    ids=str,
)
def test_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as found:
        parse_settings({**CONFIG, **fields})
    assert words in str(found.value)


def test_new_fields_that_are_off_change_nothing() -> None:
    assert parse_settings({**CONFIG, "something_new": None, "another": False}).rank == 4


@pytest.mark.parametrize("name", ["r", "lora_alpha", "peft_type"])
def test_fields_that_must_be_there(name: str) -> None:
    fields = {key: value for key, value in CONFIG.items() if key != name}
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        parse_settings(fields)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "there is no adapter_config.json"),
        (b"{", "is not JSON"),
        (b"[]", "must hold a JSON object"),
        (b"[" * 100_000, "is not JSON"),
        (b" " * (1 << 20) + b"{}", "more than 1048576 bytes"),
    ],
    ids=["missing", "broken", "list", "deep", "long"],
)
def test_files_that_are_not_read(data: bytes | None, words: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "adapter_config.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=words):
        read_settings(tmp_path)


def test_file(tmp_path: Path) -> None:
    text = json.dumps(dict(CONFIG)).ljust(1 << 20)
    (tmp_path / "adapter_config.json").write_text(text)
    settings, data = read_settings(tmp_path)
    assert settings == parse_settings(CONFIG)
    assert data == text.encode()
