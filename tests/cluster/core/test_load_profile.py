"""The load profile file, and the loads of devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.core.errors import ConfigError
from cluster.core.load_profile import (
    BankLoad,
    LoadProfile,
    device_loads,
    load_profile,
)
from cluster.core.placement import BankPlacement


def _profile(*counts: float, model: str = "demo") -> LoadProfile:
    bank = BankLoad(bank="mlp", layer=0, counts=counts)
    return LoadProfile(model=model, top_k=2, tokens=10, banks=(bank,))


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    path.write_text(json.dumps(_profile(1, 2, 3.5).to_dict()))
    assert load_profile(path) == _profile(1, 2, 3.5)
    assert json.loads(path.read_text()) == {
        "schema": 1,
        "model": "demo",
        "top_k": 2,
        "tokens": 10,
        "banks": [{"bank": "mlp", "layer": 0, "counts": [1, 2, 3.5]}],
    }


def test_a_profile_may_be_without_load() -> None:
    bank = BankLoad(bank="mlp", layer=0, counts=(0, 0.0))
    assert LoadProfile(model="demo", top_k=1, tokens=0, banks=(bank,)).counts("mlp", 0) == (0, 0)


def test_merging_adds_counts_and_tokens() -> None:
    merged = _profile(1, 2).merge(_profile(10, 20))
    assert merged.tokens == 20
    assert merged.counts("mlp", 0) == (11, 22)
    assert merged.counts("mlp", 9) == ()


def test_profiles_of_other_shape_are_not_merged() -> None:
    with pytest.raises(ConfigError, match="must have the banks, experts and top_k of demo"):
        _profile(1, 2).merge(_profile(1, 2, 3, model="other"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": 2}, "load_profile.schema"),
        ({"top_k": 0}, "top_k"),
        ({"tokens": -1}, "tokens"),
        ({"banks": [{"bank": "mlp", "layer": 0, "counts": []}]}, "must have a count"),
        ({"banks": [{"bank": "mlp", "layer": 0, "counts": [-1]}]}, "not negative"),
        ({"banks": [{"bank": "mlp", "layer": 0, "counts": [float("nan")]}]}, "finite"),
        ({"banks": [{"bank": "mlp", "layer": 0, "counts": [10**400]}]}, "finite"),
        ({"banks": [{"bank": "mlp", "layer": 0, "counts": ["x"]}]}, "not a load profile"),
        ({"banks": [{"bank": "mlp"}]}, "not a load profile"),
        ({"banks": 7}, "not a load profile"),
        ({"banks": [{"bank": "mlp", "layer": 0, "counts": [1]}] * 2}, "each bank once"),
    ],
)
def test_a_broken_rule_is_named(change: dict[str, Any], words: str) -> None:
    data = _profile(1).to_dict() | change
    with pytest.raises(ConfigError, match=words):
        LoadProfile.from_dict(data)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json"):
        load_profile(tmp_path / "none.json")
    for content in ("{", "[" * 100_000):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ConfigError, match=r"bad\.json"):
            load_profile(tmp_path / "bad.json")


def test_load_follows_the_copies_shares() -> None:
    bank = BankPlacement.from_maps(
        bank="mlp",
        layer=0,
        num_experts=3,
        physical_to_logical=[[0, 1], [1, 2], [-1, -1]],
        split=[[1.0, 0.25], [0.75, 1.0], [0.0, 0.0]],
    )
    assert device_loads(bank, [10, 40, 30]) == (20, 60, 0)
