"""Adapters on their way into an engine: orders of the controller, carried out between steps."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.checkpoints.adapters import random_adapter, target_shapes
from benchmarks.harness.local_engine import LocalEngine
from cluster.config.lora import LoraSection
from cluster.core.frames import AdapterRecord, AdaptersKept, KeepAdapters
from tests.harness.threads import fail_to_start
from workers.lora.adapters import PreparedAdapter
from workers.lora.loaded import LoadedAdapters
from workers.process.intake.adapters import AdapterIntake
from workers.requests.request import Request, SamplingParams


class HangingAdapters(LoadedAdapters):
    """Folders below ``/dead`` are on a file server that does not answer."""

    may_end = threading.Event()

    def read(self, path: Path) -> PreparedAdapter:
        """See ``LoadedAdapters``."""
        if path.is_relative_to("/dead"):
            self.may_end.wait()
        return super().read(path)


class Intake:
    """An intake, and what wakes it."""

    def __init__(self, checkpoint: Path) -> None:
        self._checkpoint = checkpoint
        self.num_wakes = 0
        self.allow("/")

    def allow(self, *roots: str) -> None:
        """Start an engine whose adapters may be in these folders."""
        self.local = LocalEngine(self._checkpoint, lora=LoraSection(lora_roots=roots))
        self.engine = self.local.engine
        self.intake = AdapterIntake(self.engine, self._wake)

    def _wake(self) -> None:
        self.num_wakes += 1

    def order(self, number: int, *adapters: AdapterRecord) -> None:
        self.intake.handle_command(KeepAdapters(number=number, adapters=adapters))

    def answer(self, limit_s: float = 20.0) -> AdaptersKept:
        """The next answer."""
        end = time.monotonic() + limit_s
        while time.monotonic() < end:
            if (found := self.intake.advance()) is not None:
                return found
            time.sleep(0.001)
        raise TimeoutError("no answer")


@pytest.fixture
def intake(tiny_checkpoint: Path) -> Intake:
    return Intake(tiny_checkpoint)


@pytest.fixture
def sql(tiny_checkpoint: Path, tmp_path: Path) -> AdapterRecord:
    folder = random_adapter(target_shapes(tiny_checkpoint)).write(tmp_path / "sql")
    return AdapterRecord(key="sql@1", name="sql", path=str(folder))


def test_orders_are_carried_out(intake: Intake, sql: AdapterRecord) -> None:
    assert intake.intake.advance() is None
    intake.order(1, sql)
    first = intake.answer()
    assert first.number == 1
    assert first.digests.keys() == {"sql@1"}
    assert intake.num_wakes
    assert intake.engine.adapters.keys == ("sql@1",)
    again = AdapterRecord(key="again@2", name="again", path=sql.path, digest=first.digests["sql@1"])
    intake.order(2, again)
    second = intake.answer()
    assert second == AdaptersKept(number=2, digests={"again@2": first.digests["sql@1"]})
    assert intake.engine.adapters.keys == ("again@2",)
    intake.order(3)
    assert intake.answer() == AdaptersKept(number=3, digests={})
    assert "again@2" not in intake.engine.adapters


def test_what_is_there_is_not_read_again(intake: Intake, sql: AdapterRecord) -> None:
    intake.order(1, sql)
    digests = intake.answer().digests
    shutil.rmtree(sql.path)
    intake.order(2, sql)
    assert intake.answer() == AdaptersKept(number=2, digests=digests)


def test_older_orders_are_not_taken(intake: Intake, sql: AdapterRecord) -> None:
    intake.order(2, sql)
    intake.order(1)
    assert intake.answer().digests.keys() == {"sql@1"}
    assert intake.intake.advance() is None


def test_a_newer_order_replaces_one_under_way(intake: Intake, sql: AdapterRecord) -> None:
    intake.order(1, sql)
    intake.order(2)
    assert intake.answer() == AdaptersKept(number=2, digests={})
    assert not intake.engine.adapters.keys


def test_errors_are_answered_beside_what_is_ready(intake: Intake, sql: AdapterRecord) -> None:
    missing = AdapterRecord(key="no@2", name="no", path="/nowhere/at/all")
    changed = AdapterRecord(key="other@3", name="other", path=sql.path, digest="another")
    intake.order(1, sql, missing, changed)
    found = intake.answer()
    assert found.digests.keys() == {"sql@1"}
    assert found.errors == {
        "no@2": "/nowhere/at/all: no such folder",
        "other@3": "its files have changed since it was loaded",
    }


def test_an_order_is_another_try(intake: Intake, sql: AdapterRecord, tmp_path: Path) -> None:
    Path(sql.path).rename(tmp_path / "elsewhere")
    intake.order(1, sql)
    assert intake.answer().errors
    (tmp_path / "elsewhere").rename(sql.path)
    intake.order(2, sql)
    assert intake.answer().digests.keys() == {"sql@1"}


def test_links_lead_out_of_no_folder_of_adapters(
    intake: Intake, sql: AdapterRecord, tmp_path: Path
) -> None:
    """The controller, on another host, does not see where a link leads."""
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "link").symlink_to(sql.path)
    (tmp_path / "root").symlink_to(tmp_path / "adapters")
    path = str(tmp_path / "root" / "link")
    linked = AdapterRecord(key="link@1", name="link", path=path)
    intake.allow(str(tmp_path / "root"))
    intake.order(1, linked)
    assert intake.answer().errors == {"link@1": f"{path} is not in a folder of --lora-roots"}
    intake.allow(str(tmp_path / "root"), str(tmp_path / "sql"))
    intake.order(2, linked)
    assert intake.answer().digests.keys() == {"link@1"}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_files_that_are_links_lead_out_of_no_folder_of_adapters(
    intake: Intake, sql: AdapterRecord, tmp_path: Path, name: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    root = tmp_path / "root"
    root.mkdir()
    path = Path(sql.path).rename(root / "sql")
    (path / name).rename(outside / name)
    (path / name).symlink_to(outside / name)
    linked = AdapterRecord(key="link@1", name="link", path=str(path))
    intake.allow(str(root))
    intake.order(1, linked)
    assert intake.answer().errors == {"link@1": f"{path / name} is not in a folder of --lora-roots"}
    intake.allow(str(root), str(outside))
    intake.order(2, linked)
    assert intake.answer().digests.keys() == {"link@1"}


def test_a_folder_that_hangs_delays_no_later_order(intake: Intake, sql: AdapterRecord) -> None:
    adapters = HangingAdapters(intake.engine.runner.model, LoraSection(lora_roots=("/",)))
    intake.engine.adapters = adapters
    known = set(threading.enumerate())
    dead = [AdapterRecord(key=f"dead@{i}", name="dead", path=f"/dead/{i}") for i in range(2)]
    intake.order(1, dead[0], sql)
    assert intake.intake.advance() is None
    (thread,) = set(threading.enumerate()) - known
    assert thread.daemon  # the process can end
    intake.order(2, dead[1], sql)
    assert intake.intake.advance() is None
    intake.order(3, sql)
    assert intake.answer().digests.keys() == {"sql@1"}
    assert adapters.keys == ("sql@1",)
    adapters.may_end.set()
    thread.join(20.0)
    assert not thread.is_alive()
    assert intake.intake.advance() is None


def test_a_thread_that_cannot_start_is_an_error_of_its_adapter(
    intake: Intake, sql: AdapterRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_start(monkeypatch, "adapter-reader")
    intake.order(1, sql)
    assert intake.num_wakes == 1
    assert intake.answer().errors == {"sql@1": "RuntimeError: can't start new thread"}
    monkeypatch.undo()
    intake.order(2, sql)
    assert intake.answer().digests.keys() == {"sql@1"}


def test_adapters_and_their_sequences_are_counted_by_name(
    intake: Intake, sql: AdapterRecord
) -> None:
    assert intake.intake.stats({}) == {
        "lora_adapters_loaded": 0.0,
        "lora_adapters_max": 8.0,
        "lora_adapters_bytes": 0.0,
    }
    newer, other = (
        AdapterRecord(key=key, name=key[:3], path=sql.path) for key in ("sql@2", "two@3")
    )
    intake.order(1, sql, newer, other)
    intake.answer()
    engine, params = intake.engine, SamplingParams(max_tokens=4, ignore_eos=True)
    for key in ("sql@1", "sql@2", ""):
        engine.add_request(Request(request_id=key, prompt=(1, 2), params=params, adapter=key))
    assert in_state(intake, "waiting") == {"sql": 2.0, "two": 0.0}
    intake.local.step()
    assert in_state(intake, "running") == {"sql": 2.0, "two": 0.0}
    assert in_state(intake, "waiting", {"two@3": 5, "": 1}) == {"sql": 0.0, "two": 5.0}
    stats = intake.intake.stats({})
    assert stats["lora_adapters_loaded"] == 3.0
    assert stats["lora_adapters_bytes"] == engine.adapters.num_bytes > 0
    intake.order(2, sql, newer)
    assert in_state(intake, "running") == {"sql": 2.0}


def in_state(
    intake: Intake, state: str, waiting: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Sequences by name."""
    stats = intake.intake.stats(waiting or {})
    begin = f'lora_requests_{state}{{lora_name="'
    return {k.removeprefix(begin)[:-2]: n for k, n in stats.items() if k.startswith(begin)}
