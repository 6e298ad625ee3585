"""Which adapters a configuration may name, and how many."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config.cluster import ClusterConfig
from cluster.config.gateway import GatewaySection
from cluster.config.lora import LoraSection, is_valid_name
from cluster.config.model import ModelSection
from cluster.core.errors import ConfigError


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_loras": -1}, "max_loras (-1) must not be negative"),
        ({"max_lora_rank": 0}, "max_lora_rank (0) must be at least 1"),
        ({"lora_modules": ("a",)}, "lora_modules (a) must be NAME=FOLDER"),
        ({"lora_modules": ("=x",)}, "lora_modules (=x) must be NAME=FOLDER"),
        ({"lora_modules": ("a b=x",)}, "NAME must be 1 to 128 letters"),
        ({"lora_modules": ("a=x", "a=y")}, "must not name an adapter twice"),
        ({"lora_modules": ("a@=/x",)}, "must be NAME=FOLDER or NAME@KEY+KEY=FOLDER"),
        ({"lora_modules": ("a@k+=/x",)}, "lora_modules (a@k+=/x) must be NAME=FOLDER"),
        ({"lora_roots": ("adapters",)}, "lora_roots (adapters) must be an absolute path"),
        ({"lora_modules": ("a=x", "b=y"), "max_loras": 1}, "must not exceed max_loras (1)"),
    ],
    ids=str,
)
def test_what_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as found:
        LoraSection(**fields)
    assert words in str(found.value)


def test_an_adapter_has_not_the_name_of_the_model() -> None:
    model = ModelSection(path="/m", served_model_name="m")
    with pytest.raises(ConfigError, match="must not name an adapter as the model"):
        ClusterConfig(model=model, lora=LoraSection(lora_modules=("m=/a",)))


def test_names_and_folders() -> None:
    section = LoraSection(lora_modules=("sql=/a/b=c", "org/chat:1=/d"))
    assert section.modules == (("sql", "/a/b=c"), ("org/chat:1", "/d"))
    assert not is_valid_name("-x")
    assert not is_valid_name("x" * 129)


def test_an_adapter_may_be_for_some_keys() -> None:
    section = LoraSection(lora_modules=("sql@team-a+team-b=/a", "open=/b"))
    assert [module.tenants for module in section.adapters] == [("team-a", "team-b"), ()]
    assert tuple(map(str, section.adapters)) == section.lora_modules
    model = ModelSection(path="/m", served_model_name="m")
    with pytest.raises(ConfigError, match=r"names keys: it needs api_key or api_key_file"):
        ClusterConfig(model=model, lora=section)
    keys = GatewaySection(api_key_file="/keys")
    assert ClusterConfig(model=model, lora=section, gateway=keys).lora is section
