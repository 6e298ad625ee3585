"""Which placements a worker may run."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from cluster.core.control_codec import decode, encode
from cluster.core.errors import ProtocolError
from cluster.core.frames import NewEpoch
from cluster.core.placement import ExpertPlacement, contiguous
from tests.cluster.controller.fakes_cluster import BANKS
from workers.experts.transfer.loading import Obstacle
from workers.process.control.epochs import EpochPlacements

FIRST = contiguous(BANKS, 2, 1)
MOVED = replace(FIRST.banks[1], decode_device=(1, *FIRST.banks[1].decode_device[1:]))


def frame(epoch: int, base: int = 1, place: int = 1) -> NewEpoch:
    """Another decode table for one bank, as it comes from the wire."""
    banks = ((place, MOVED),)
    sent = encode(NewEpoch(generation=3, epoch=epoch, base_epoch=base, banks=banks))
    found = decode(sent[4:])
    assert isinstance(found, NewEpoch)
    return found


@pytest.fixture
def maps() -> EpochPlacements:
    made = EpochPlacements()
    made.start(FIRST)
    return made


def test_an_epoch_changes_the_banks_it_names(maps: EpochPlacements) -> None:
    assert maps.add_announced(frame(2)) == ExpertPlacement(epoch=2, banks=(FIRST.banks[0], MOVED))
    assert maps.current == FIRST
    assert not maps.switch_to(1)
    assert maps.switch_to(2)
    assert not maps.switch_to(2)
    assert maps.current.banks[1] == MOVED


def test_an_epoch_that_was_given_up_never_runs(maps: EpochPlacements) -> None:
    maps.add_announced(frame(2))
    maps.add_announced(frame(3))
    assert maps.switch_to(3)
    with pytest.raises(ProtocolError, match="epoch 2, which was not announced"):
        maps.switch_to(2)


def test_an_epoch_may_follow_one_whose_header_is_on_the_way(maps: EpochPlacements) -> None:
    maps.add_announced(frame(2))
    assert maps.add_announced(frame(3, base=2, place=1)).epoch == 3
    assert maps.switch_to(2)
    assert maps.switch_to(3)


def test_a_generation_begins_anew(maps: EpochPlacements) -> None:
    maps.add_announced(frame(2))
    maps.start(replace(FIRST, epoch=7))
    assert maps.current.epoch == 7
    with pytest.raises(ProtocolError, match="epoch 2"):
        maps.switch_to(2)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (frame(4, base=3), "follows 3, but 1 runs"),
        (frame(4, place=0), "at a wrong index"),
        (frame(4, place=5), "bank 5, which does not exist"),
        (frame(4, place=-1), "bank -1, which does not exist"),
    ],
)
def test_nonsense_is_refused(maps: EpochPlacements, bad: NewEpoch, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        maps.add_announced(bad)
    assert maps.current == FIRST


# ---- orders to write expert slots -------------------------------------------------------------

HELD, SLOT = FIRST.banks[1].physical_to_logical[0][0], 0
FREE = len(FIRST.banks[1].physical_to_logical[0])
"""A slot that the maps do not name."""


def moved_to(slot: int, expert: int, epoch: int) -> NewEpoch:
    """An epoch in which one slot of device 0 has another expert."""
    rows = [list(row) for row in FIRST.banks[1].physical_to_logical]
    rows[0] += [-1] * (slot + 1 - len(rows[0]))
    rows[0][slot] = expert
    banks = ((1, FIRST.banks[1].with_slots(rows)),)
    return NewEpoch(generation=3, epoch=epoch, base_epoch=1, banks=banks)


def test_slots_outside_the_maps_may_be_written(maps: EpochPlacements) -> None:
    assert maps.obstacle(0, [(1, FREE, 5)], 1, 1) is None
    assert maps.obstacle(0, [(1, SLOT, HELD)], 1, 1) is None  # its expert never came


def test_an_order_of_who_does_not_know_the_epoch_in_force_is_refused(
    maps: EpochPlacements,
) -> None:
    """An earlier controller ordered the switch, and this one does not know of it yet."""
    maps.add_announced(moved_to(FREE, 5, 2))
    assert maps.switch_to(2)
    found = maps.obstacle(0, [(1, FREE, 6)], 1, 1)
    assert found == Obstacle("commanded in epoch 1, but epoch 2 is current", passes=False)


@pytest.mark.parametrize("expert", [(HELD + 1) % 8, -1])
def test_a_slot_in_force_is_neither_overwritten_nor_emptied(
    maps: EpochPlacements, expert: int
) -> None:
    words = f"slot {SLOT} of bank 1 has expert {HELD} in epoch 1"
    work = [(1, FREE, 5), (1, SLOT, expert)]
    assert maps.obstacle(0, work, 1, 1) == Obstacle(words, passes=False)
    assert maps.obstacle(0, work, 1, 4) == Obstacle(words, passes=True)  # new maps will come
    assert maps.obstacle(0, work, 2, 1) == Obstacle(words, passes=True)  # the header will


def test_an_epoch_that_may_follow_by_then_protects_its_slots(maps: EpochPlacements) -> None:
    maps.add_announced(moved_to(FREE, 5, 2))
    assert maps.obstacle(0, [(1, FREE, 6)], 1, 1) is None  # it was given up, its controller knows
    found = maps.obstacle(0, [(1, FREE, 6)], 2, 1)
    assert found is not None
    assert found.passes
