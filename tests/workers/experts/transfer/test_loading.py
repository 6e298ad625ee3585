"""Experts that are loaded while a worker serves: orders, answers, and steps at the same time."""

from __future__ import annotations

import queue
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness.engine_stream import TIMEOUT_S
from cluster.core.errors import PeerLostError
from cluster.core.frames import ExpertsLoaded, LoadExperts
from cluster.core.placement import BankShape, contiguous
from tests.fakes import TINY_CONFIG, write_tiny_checkpoint
from tests.harness.threads import fail_to_start
from tests.workers.native.builds import NAMES, library
from workers.experts.slots import ExpertSlots
from workers.experts.sources import CheckpointSource, ExpertSource, ExpertWeight
from workers.experts.transfer.loading import CHECKPOINT, ExpertLoader, Obstacle
from workers.model.config import BankSpec
from workers.model.loading.checkpoint import Checkpoint
from workers.native.thread_team import ThreadTeam

CPU = torch.device("cpu")


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": dict,
    "compiled": lambda: {"team": ThreadTeam(library(NAMES[0]), 2)},
    "deterministic": lambda: {"deterministic": True},
}
"""What makes the kernels, by their kind."""
KINDS = list(OPTIONS)


class Loading:
    """Slots with the first half of the experts, and a loader."""

    def __init__(
        self,
        path: Path,
        max_slots: int | None = None,
        deterministic: bool = False,
        team: ThreadTeam | None = None,
    ) -> None:
        self.checkpoint = Checkpoint(path)
        banks = self.checkpoint.family.banks
        kind = torch.float32
        self.whole = ExpertSlots(banks, 8, kind, CPU, deterministic=deterministic, team=team)
        self.whole.load_all(Checkpoint(path))
        self.slots = ExpertSlots(banks, 4, kind, CPU, deterministic=deterministic, team=team)
        shapes = [BankShape(bank=b.bank, layer=b.layer, num_experts=b.num_experts) for b in banks]
        self.slots.load_placement(contiguous(shapes, 2), 0, self.checkpoint)
        self.answers: queue.Queue[ExpertsLoaded] = queue.Queue()
        self.obstacles: deque[Obstacle | None] = deque()
        """What the next looks find in the way of an order."""
        self.loader = ExpertLoader(
            self.slots,
            {CHECKPOINT: self._open_checkpoint, "broken": self._open_broken},
            self.answers.put,
            obstacle=lambda work, epoch: self.obstacles.popleft() if self.obstacles else None,
            max_slots=max_slots,
            min_slots=4,
        )

    def _open_checkpoint(self, source: Mapping[str, Any]) -> ExpertSource:
        return CheckpointSource(self.checkpoint.another())

    def _open_broken(self, source: Mapping[str, Any]) -> ExpertSource:
        return BrokenSource(self._open_checkpoint(source), str(source["peer"]))

    def load(self, *experts: list[int], **source: Any) -> ExpertsLoaded:
        """Give an order and wait for its answer."""
        self.loader.order(LoadExperts(order=7, experts=list(experts), source=source))
        return self.answers.get(timeout=TIMEOUT_S)

    def check(self, bank: int, slot: int, expert: int) -> None:
        """A slot computes what the expert does."""
        inputs = torch.randn(3, 32)
        rows = torch.arange(3)
        found = self.slots.banks[bank].compute(0, inputs, rows, torch.full((3,), slot))
        expected = self.whole.banks[bank].compute(0, inputs, rows, torch.full((3,), expert))
        assert torch.allclose(found, expected, atol=1e-6)


class BrokenSource:
    """Breaks after the first matrix."""

    def __init__(self, inner: ExpertSource, peer: str) -> None:
        self._inner = inner
        self._peer = peer

    @property
    def num_bytes(self) -> int:
        return self._inner.num_bytes

    def weights(self, bank: BankSpec, expert: int, dtype: torch.dtype) -> Iterator[ExpertWeight]:
        yield next(iter(self._inner.weights(bank, expert, dtype)))
        raise PeerLostError(self._peer, "reset")

    def close(self) -> None:
        self._inner.close()


@contextmanager
def loading(path: Path, **options: Any) -> Iterator[Loading]:
    found = Loading(path, **options)
    try:
        yield found
    finally:
        found.loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_loaded_into_new_slots(tiny_checkpoint: Path, kind: str) -> None:
    with loading(tiny_checkpoint, **OPTIONS[kind]()) as found:
        assert found.load([0, 4, 7], [0, 5, 4], [1, 6, 5]) == ExpertsLoaded(
            order=7, num_bytes=found.checkpoint.expert_bytes(found.slots.banks[0].spec, 4) * 3
        )
        assert [bank.num_slots for bank in found.slots.banks] == [6, 7]
        for bank, slot, expert in ((0, 4, 7), (0, 5, 4), (1, 6, 5), (0, 0, 0), (1, 3, 3)):
            found.check(bank, slot, expert)
        assert found.load([0, 4, -1], [0, 5, 6]).error == ""
        found.check(0, 5, 6)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ([2, 4, 4], "there is no bank 2"),
        ([-1, 4, 4], "there is no bank -1"),
        ([0, 4, 8], "bank 0 has no expert 8"),
        ([0, 4, -2], "bank 0 has no expert -2"),
        ([0, -1, 4], "slot -1 is beyond the capacity of bank 0"),
        ([0, 16, 4], "slot 16 is beyond the capacity of bank 0"),
        ([0, 4], "[0, 4] is not [bank, slot, expert]"),
        ([0, 4, True], "[0, 4, True] is not [bank, slot, expert]"),
        ("abc", "'abc' is not [bank, slot, expert]"),
    ],
)
def test_an_order_that_makes_no_sense_is_refused(
    tiny_checkpoint: Path, entry: list[int], words: str
) -> None:
    with loading(tiny_checkpoint) as found:
        assert found.load([0, 5, 4], entry).error == words
        assert found.slots.banks[0].num_slots == 4  # nothing was begun
        assert found.load([0, 4, 5]).error == ""


def test_where_slots_cannot_grow_there_is_a_limit(tiny_checkpoint: Path) -> None:
    with loading(tiny_checkpoint, max_slots=4) as found:
        assert found.load([0, 4, 4]).error == "slot 4 is beyond the capacity of bank 0"
        assert found.load([0, 3, 4]).error == ""
        found.check(0, 3, 4)


def test_what_is_not_used_any_more_is_freed(tiny_checkpoint: Path) -> None:
    with loading(tiny_checkpoint) as found:
        assert found.load([0, 4, 7], [0, 5, 4], [1, 6, 5]).error == ""
        found.loader.keep_only([[0, -1, 2, 3, 7], [0, 1, -1, -1]])
        assert found.load([1, 3, 6]).error == ""  # a later order is not touched by it
        assert [bank.num_slots for bank in found.slots.banks] == [5, 4]
        assert found.slots.contents(0) == {0: 0, 2: 2, 3: 3, 4: 7}
        assert found.slots.contents(1) == {0: 0, 1: 1, 3: 6}
        assert found.slots.rows() == ((0, -1, 2, 3, 7), (0, 1, -1, 6))
        assert found.slots.read_expert(0, 1) is None
        found.check(0, 4, 7)
        found.check(1, 3, 6)


def test_where_slots_cannot_grow_nothing_is_freed(tiny_checkpoint: Path) -> None:
    with loading(tiny_checkpoint, max_slots=6) as found:
        assert found.load([0, 4, 7]).error == ""
        found.loader.keep_only([[0], [0]])
        assert found.load([0, 5, 6]).error == ""
        assert found.slots.contents(0) == {0: 0, 1: 1, 2: 2, 3: 3, 4: 7, 5: 6}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    with loading(tmp_path) as found:
        shutil.rmtree(tmp_path)
        error = found.load([0, 4, 5]).error
        assert "model.safetensors" in error
        assert "No such file" in error
        assert str(tmp_path) not in error
        found.check(0, 0, 0)  # what was loaded stays


def test_another_checkpoint_in_the_same_place_is_refused(tmp_path: Path) -> None:
    write_tiny_checkpoint(tmp_path)
    with loading(tmp_path) as found:
        write_tiny_checkpoint(tmp_path, {**TINY_CONFIG, "num_hidden_layers": 1})
        assert found.load([0, 4, 5]).error == (
            "model.safetensors is no longer the file of this checkpoint: its header changed"
        )


def test_a_source_that_breaks_is_reported_in_its_words(tiny_checkpoint: Path) -> None:
    with loading(tiny_checkpoint) as found:
        answer = found.load([0, 4, 5], kind="broken", peer="expert-2")
        assert "expert-2" in answer.error
        assert found.load([0, 4, 5], kind="nowhere").error == "no source of kind 'nowhere'"
        assert found.load([0, 4, 5]).error == ""
        found.check(0, 4, 5)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_go_on_while_banks_grow(tiny_checkpoint: Path, kind: str) -> None:
    """Outputs of slots that no order touches do not change by a bit."""
    with loading(tiny_checkpoint, **OPTIONS[kind]()) as found:
        inputs = torch.randn(24, 32)
        rows, slots = torch.arange(24), torch.arange(24) % 4
        bank = found.slots.banks[0]
        expected = bank.compute(0, inputs, rows, slots)
        stop = threading.Event()
        wrong: list[str] = []

        def compute() -> None:
            while not stop.is_set():
                try:
                    if not torch.equal(bank.compute(0, inputs, rows, slots), expected):
                        wrong.append("another output")
                except Exception as err:
                    wrong.append(repr(err))

        thread = threading.Thread(target=compute)
        thread.start()
        for _ in range(2):
            for slot in range(4, 16):
                assert found.load([0, slot, slot % 8]).error == ""
            found.loader.keep_only([[0, 1, 2, 3], [0, 1, 2, 3]])
        assert found.load([1, 0, 0]).error == ""  # after it
        assert bank.num_slots == 4
        stop.set()
        thread.join(TIMEOUT_S)
        assert wrong == []


def test_an_order_is_given_up_at_the_end(tiny_checkpoint: Path) -> None:
    found = Loading(tiny_checkpoint)
    found.loader.close()
    found.loader.order(LoadExperts(order=1, experts=[[0, 4, 5]]))
    assert found.answers.empty()
    assert found.slots.banks[0].num_slots == 4


def test_an_order_waits_for_an_obstacle_that_passes(tiny_checkpoint: Path) -> None:
    with loading(tiny_checkpoint) as found:
        found.obstacles += [Obstacle("the header comes", True), Obstacle("and comes", True)]
        assert found.load([0, 4, 5]).error == ""
        assert not found.obstacles
        found.check(0, 4, 5)


def test_an_order_that_would_overwrite_a_slot_in_force_is_refused(tiny_checkpoint: Path) -> None:
    with loading(tiny_checkpoint) as found:
        found.obstacles += [Obstacle("the header comes", True), Obstacle("slot 0 is used", False)]
        assert found.load([0, 0, 5]).error == "slot 0 is used"
        assert found.slots.contents(0)[0] == 0


def test_experts_are_loaded_at_the_limit_of_threads(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with loading(tiny_checkpoint) as found:
        fail_to_start(monkeypatch, "expert-loader")
        found.loader.order(LoadExperts(order=7, experts=[[0, 0, 0]], source={}))
        assert found.answers.get(timeout=2.0) == ExpertsLoaded(order=7, num_bytes=0)


def test_what_is_in_its_slot_is_not_read_again(tiny_checkpoint: Path) -> None:
    """A step may read it at this moment."""
    with loading(tiny_checkpoint) as found:
        assert found.load([0, 0, 0], [1, 2, 2]) == ExpertsLoaded(order=7, num_bytes=0)


def test_a_slot_that_comes_into_force_before_it_is_overwritten_is_held_on(
    tiny_checkpoint: Path,
) -> None:
    """The loader's last look at the maps finds that they name the slot by now."""
    with loading(tiny_checkpoint) as found:
        found.obstacles += [None, Obstacle("slot 0 is used", False)]
        assert found.load([0, 0, 5]).error == "slot 0 is used"
        assert found.slots.contents(0)[0] == 0
        found.check(0, 0, 0)


def test_a_slot_that_a_later_generation_uses_is_not_freed(tiny_checkpoint: Path) -> None:
    with loading(tiny_checkpoint) as found:
        assert found.load([0, 5, 7]).error == ""
        found.obstacles += [Obstacle("slot 5 is used", False)]
        found.loader.keep_only([[0, 1, 2, 3], [0, 1, 2, 3]])
        assert found.load([1, 0, 0]).error == ""  # after it
        assert found.slots.contents(0)[5] == 7
        found.check(0, 5, 7)
