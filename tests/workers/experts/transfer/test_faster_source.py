"""The choice between checkpoint and other workers, with sources and a clock moved by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import torch

from cluster.core.errors import CheckpointError, ExpertMeshError, PeerLostError, ProtocolError
from cluster.core.holders import ExpertHolder
from tests.simulation.toy_model import BANKS
from workers.experts.sources import ExpertWeight
from workers.experts.transfer.faster_source import NUM_TRIALS, FasterSource, HoldersSource
from workers.model.config import BankSpec
from workers.quantization.matrix import plain

BANK = BANKS[0]
DTYPE = torch.float32


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeSource:
    """Takes ``takes_s`` for each expert, and ``opening_s`` more for the first."""

    clock: Clock
    takes_s: float = 1.0
    opening_s: float = 0.0
    error: ExpertMeshError | None = None
    num_bytes: int = 0
    given: list[int] = field(default_factory=list)
    is_closed: bool = False

    def weights(self, bank: BankSpec, expert: int, dtype: torch.dtype) -> Iterator[ExpertWeight]:
        for exchange, matrix, shape in bank.matrices:
            yield ExpertWeight(exchange, matrix, torch.full(shape, float(expert)))
            if self.error is not None:
                raise self.error
        self.clock.now += self.takes_s + (0.0 if self.given else self.opening_s)
        self.given.append(expert)

    def close(self) -> None:
        self.is_closed = True


def read(source: FasterSource | HoldersSource, *experts: int) -> None:
    for expert in experts:
        matrices = list(source.weights(BANK, expert, DTYPE))
        whole = matrices[-len(BANK.matrices) :]  # what a source that failed gave comes before
        assert [(m.exchange, m.matrix) for m in whole] == [(e, i) for e, i, _ in BANK.matrices]
        assert all(float(plain(m.weight).flatten()[0]) == expert for m in whole)


def both(
    clock: Clock, disk_s: float, peer_s: float, opening_s: float = 0.0
) -> tuple[FakeSource, FakeSource, FasterSource]:
    disk, peers = FakeSource(clock, disk_s), FakeSource(clock, peer_s, opening_s)
    return disk, peers, FasterSource({"checkpoint": disk, "peer": peers}, clock)


@pytest.mark.parametrize(("disk_s", "peer_s"), [(1.0, 2.0), (2.0, 1.0)])
def test_both_are_tried_and_the_faster_one_goes_on(disk_s: float, peer_s: float) -> None:
    disk, peers, source = both(Clock(), disk_s, peer_s)
    read(source, *range(8))
    slow, fast = (peers, disk) if disk_s < peer_s else (disk, peers)
    assert len(slow.given) == NUM_TRIALS
    assert len(fast.given) == 8 - NUM_TRIALS


def test_the_time_to_connect_does_not_count() -> None:
    disk, peers, source = both(Clock(), 2.0, 1.0, opening_s=60.0)
    read(source, *range(8))
    assert len(peers.given) == 6
    assert len(disk.given) == 2


def test_the_time_to_store_counts_as_a_mapped_file_is_read_then() -> None:
    clock = Clock()
    disk, peers, source = both(clock, 0.0, 1.0)
    for expert in range(8):
        for _ in source.weights(BANK, expert, DTYPE):
            clock.now += 5.0 if len(disk.given) + len(peers.given) in (0, 2) else 0.0
    assert len(peers.given) == 6


def test_a_source_that_becomes_slow_is_left_for_the_other() -> None:
    disk, peers, source = both(Clock(), 1.0, 2.0)
    read(source, *range(5))
    disk.takes_s = 60.0  # the rest of the file is not in the page cache
    read(source, 5, 6, 7)
    assert disk.given[-1] == 5
    assert peers.given[-2:] == [6, 7]


def test_a_source_that_stood_still_for_a_moment_is_measured_anew() -> None:
    disk, peers, source = both(Clock(), 1.0, 0.1)
    read(source, *range(5))
    peers.takes_s = 6.0
    read(source, 5)
    peers.takes_s = 0.1
    read(source, *range(6, 60))
    assert disk.given == [0, 2, *range(6, 55)]  # 8 times 6 s
    assert peers.given[-5:] == list(range(55, 60))


@pytest.mark.parametrize("broken", ["checkpoint", "peer"])
def test_the_other_source_gives_what_one_could_not(broken: str) -> None:
    disk, peers, source = both(Clock(), 1.0, 1.0)
    bad, good = (disk, peers) if broken == "checkpoint" else (peers, disk)
    bad.error = CheckpointError("gone") if broken == "checkpoint" else PeerLostError("e", "gone")
    read(source, *range(8))
    assert bad.given == []
    assert good.given == list(range(8))


def test_where_both_fail_the_error_is_that_of_the_disk() -> None:
    disk, peers, source = both(Clock(), 1.0, 1.0)
    disk.error, peers.error = CheckpointError("the data changed"), ProtocolError("not held")
    with pytest.raises(CheckpointError, match="the data changed"):
        read(source, 0)
    source.close()
    assert disk.is_closed
    assert peers.is_closed


def holder(name: str, *experts: int) -> ExpertHolder:
    return ExpertHolder(name=name, address=f"{name}:1", experts=(experts, ()))


def holders(
    sources: dict[str, FakeSource],
    *found: ExpertHolder,
    on_read: Callable[[BankSpec, int], None] = lambda bank, expert: None,
) -> HoldersSource:
    return HoldersSource(found, lambda h: sources[h.name], on_read)


def test_workers_are_asked_for_what_they_hold_in_turns() -> None:
    clock = Clock()
    sources = {name: FakeSource(clock) for name in ("expert-0", "expert-1", "expert-2")}
    told: list[int] = []
    source = holders(
        sources,
        holder("expert-0", *range(6)),
        holder("expert-1", *range(6)),
        holder("expert-2", 6),
        on_read=lambda bank, expert: told.append(expert),
    )
    read(source, *range(7))
    assert sources["expert-0"].given == [0, 2, 4]
    assert sources["expert-1"].given == [1, 3, 5]
    assert sources["expert-2"].given == [6]
    assert told == list(range(7))
    source.close()
    assert all(s.is_closed for s in sources.values())


def test_a_worker_that_fails_is_not_asked_again() -> None:
    clock = Clock()
    sources = {
        "expert-0": FakeSource(clock, error=PeerLostError("expert-0", "reset")),
        "expert-1": FakeSource(clock),
    }
    source = holders(sources, holder("expert-0", 0, 1, 2), holder("expert-1", 0, 1))
    read(source, 0)
    sources["expert-0"].error = None
    read(source, 1)
    assert sources["expert-0"].given == []
    with pytest.raises(ProtocolError, match="expert 2 of bank mlp layer 0: no other worker holds"):
        read(source, 2)
