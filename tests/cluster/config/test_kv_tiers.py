"""How much of lower tiers a worker may have, and where."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cluster.config.cluster import ClusterConfig, EngineSection
from cluster.config.kv_tiers import KvTiersSection
from cluster.config.model import ModelSection
from cluster.core.errors import ConfigError

MODEL = ModelSection(path="/m", served_model_name="m")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kv_host_bytes": -1}, "kv_host_bytes (-1) must not be negative"),
        ({"kv_disk_bytes": -1}, "kv_disk_bytes (-1) must not be negative"),
        ({"kv_disk_bytes": 9, "kv_disk_dir": "/kv"}, "kv_disk_bytes (9) needs kv_host_bytes"),
        (
            {"kv_host_bytes": 9, "kv_disk_bytes": 8, "kv_disk_dir": "/kv"},
            "kv_disk_bytes (8) must be at least kv_host_bytes (9)",
        ),
        ({"kv_host_bytes": 9, "kv_disk_bytes": 9}, "kv_disk_bytes (9) needs kv_disk_dir"),
        ({"session_copy_bytes_per_s": 0.0}, "session_copy_bytes_per_s (0.0) must be positive"),
        ({"kv_host_bytes": 9, "kv_disk_dir": "/kv"}, "kv_disk_dir (/kv) needs kv_disk_bytes"),
        (
            {"kv_host_bytes": 9, "kv_disk_bytes": 9, "kv_disk_dir": "kv"},
            "kv_disk_dir (kv) must be an absolute path",
        ),
    ],
    ids=str,
)
def test_what_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as found:
        KvTiersSection(**fields)
    assert words in str(found.value)


def test_tiers_need_a_prefix_cache() -> None:
    engine = EngineSection(enable_prefix_caching=False)
    with pytest.raises(ConfigError, match=r"kv_host_bytes .* needs enable_prefix_caching"):
        ClusterConfig(model=MODEL, engine=engine, kv_tiers=KvTiersSection(kv_host_bytes=1))


def test_blocks_outlive_a_change_of_budgets_but_not_of_their_contents() -> None:
    config = ClusterConfig(model=MODEL)
    budgets = replace(config, engine=replace(config.engine, max_num_seqs=3, kv_cache_bytes=2**30))
    assert budgets.kv_fingerprint() == config.kv_fingerprint()
    for change in (
        replace(config, engine=replace(config.engine, kv_cache_dtype="fp8")),
        replace(config, model=replace(MODEL, dtype="float32")),
        replace(config, model=replace(MODEL, quantize="int8")),
    ):
        assert change.kv_fingerprint() != config.kv_fingerprint()
