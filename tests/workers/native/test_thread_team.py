"""Starts of the kernels' threads."""

from __future__ import annotations

import gc
import logging
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.workers.native.builds import NAMES, library
from workers.native import thread_team as team_module
from workers.native.experts import ExpertShape, SlotTable, expert_pairs
from workers.native.library import LibraryChoice
from workers.native.matrix import Matrix
from workers.native.panels import pack
from workers.native.thread_team import ThreadTeam, start_kernels

pytestmark = pytest.mark.heavy


def native_threads() -> set[str]:
    """Threads of this process that Python did not start, by number."""
    known = {str(thread.native_id) for thread in threading.enumerate()}
    return {task.name for task in Path("/proc/self/task").iterdir()} - known


def compute(team: ThreadTeam) -> torch.Tensor:
    shape = ExpertShape(512, 0, 512, torch.float32)
    table = SlotTable(shape, 1)
    table.put(0, 0, pack(team.library, torch.eye(512)))
    zeros = torch.zeros(3, dtype=torch.int64)
    return expert_pairs(team, table, torch.arange(512.0).view(1, 512), zeros, zeros)


@pytest.mark.parametrize("name", NAMES)
def test_threads_live_as_long_as_their_team(name: str) -> None:
    library(name)
    gc.collect()  # teams of other tests
    before = native_threads()
    team = ThreadTeam(library(name), 4)
    own = native_threads() - before
    assert len(own) == 3
    assert torch.equal(compute(team), torch.arange(512.0).expand(3, 512))
    del team
    gc.collect()
    assert not own & native_threads()


def test_sleeping_threads_are_woken() -> None:
    team = ThreadTeam(library(NAMES[0]), 3)
    for _ in range(20):
        time.sleep(0.002)  # longer than they spin
        assert torch.equal(compute(team), torch.arange(512.0).expand(3, 512))


def test_the_best_library_of_the_machine_is_started() -> None:
    found = start_kernels(2)
    assert found.team is not None
    assert found.team.count == 2
    assert found.description == f"native {NAMES[0]}"


def test_torch_computes_where_something_is_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start_kernels(2, "as configured").description == "torch (as configured)"
    assert start_kernels(2, "as configured").team is None
    choice = LibraryChoice(None, "there is no C compiler")
    monkeypatch.setattr(team_module, "find_library", lambda: choice)
    assert start_kernels(2).description == "torch (there is no C compiler)"


def test_a_team_is_for_one_caller_at_a_time() -> None:
    team = ThreadTeam(library(NAMES[0]), 2)
    library(NAMES[0]).functions.team_claim(team.pointer)
    with pytest.raises(RuntimeError, match="another thread computes with the team"):
        compute(team)
    library(NAMES[0]).functions.team_release(team.pointer)
    compute(team)


def test_what_torch_computes_beside_the_kernels_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    native = start_kernels(1)
    with caplog.at_level("WARNING"):
        noted = native.with_exception("torch for experts: no kernel has the activation gelu")
        assert start_kernels(1, "as configured").with_exception(
            "torch for experts"
        ).description == ("torch (as configured)")
        assert native.with_exception("") is native
    assert noted.team is native.team
    assert (
        noted.description
        == f"{native.description}; torch for experts: no kernel has the activation gelu"
    )
    assert len(caplog.records) == 1


def test_a_team_goes_on_with_another_library_and_the_same_weights() -> None:
    before = native_threads()
    own = ThreadTeam(library(NAMES[0]), 2)
    matrix = Matrix(own, torch.ones(40, 8))
    own.use(library(NAMES[-1]))
    assert own.library.name == NAMES[-1]
    assert len(native_threads() - before) == 1, "the former thread has ended"
    assert torch.equal(matrix.multiply(torch.ones(3, 8)), torch.full((3, 40), 8.0))


def test_a_host_without_a_compiler_says_once_that_torch_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    caplog.set_level(logging.INFO, "workers.native.thread_team")
    kernels = start_kernels(1)
    assert kernels.team is None
    assert kernels.description.startswith("torch (")
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", f"kernels: {kernels.description}")
    ]
    caplog.clear()
    assert start_kernels(1, "as configured").description == "torch (as configured)"
    assert [r.levelname for r in caplog.records] == ["INFO"]
