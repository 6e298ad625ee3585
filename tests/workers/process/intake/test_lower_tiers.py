"""Tiers are opened as configured, or refused by name."""

from __future__ import annotations

import stat
from contextlib import closing
from pathlib import Path

import pytest

from cluster.config.kv_tiers import KvTiersSection
from cluster.core.errors import ConfigError
from tests.reference.local_engine import LocalEngine
from tests.workers.kv.transfer.test_store import engine_of
from workers.kv.tiers.folders import claim_folder
from workers.kv.tiers.tiers import KvTiers
from workers.process.intake.lower_tiers import open_tiers

MIB = 2**20
PIB = 2**50


@pytest.fixture(scope="module")
def local(tiny_checkpoint: Path) -> LocalEngine:
    return engine_of(tiny_checkpoint)


def opened(local: LocalEngine, identity: str = "one", **fields: object) -> KvTiers | None:
    section = KvTiersSection(**fields)  # type: ignore[arg-type]
    return open_tiers(section, local.engine.cache, 0.5, 0, identity)


def test_there_are_none_by_default(local: LocalEngine) -> None:
    assert opened(local) is None


def test_more_memory_than_there_is_is_refused(local: LocalEngine) -> None:
    with pytest.raises(ConfigError, match=r"kv_host_bytes .* less than the memory of the machine"):
        opened(local, kv_host_bytes=PIB)


def test_more_disk_than_there_is_is_refused(local: LocalEngine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"kv_disk_bytes .* must not exceed the file system"):
        opened(local, kv_host_bytes=MIB, kv_disk_bytes=PIB, kv_disk_dir=str(tmp_path))
    claim_folder(tmp_path, 0, "one").release()  # it is free again


def test_a_folder_is_for_its_user_alone(local: LocalEngine, tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    found = opened(local, kv_host_bytes=MIB, kv_disk_bytes=MIB, kv_disk_dir=str(folder))
    assert found is not None
    with closing(found):
        assert [tier.name for tier in found.tiers] == ["host", "disk"]
        assert stat.S_IMODE((folder / "0").stat().st_mode) == 0o700
        text = (folder / "0" / "identity").read_text()
    cache = local.engine.cache
    assert text == f"one\n{cache.block_shape} {cache.dtype} {cache.state_shape}\n"
