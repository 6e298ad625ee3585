"""Which placements a worker may run."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from cluster.core.errors import ProtocolError
from cluster.core.frames import NewEpoch, decode, encode
from cluster.core.placement import ExpertPlacement, contiguous
from tests.cluster.controller.fakes_cluster import BANKS
from workers.process.epochs import EpochPlacements

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
    assert maps.learn(frame(2)) == ExpertPlacement(epoch=2, banks=(FIRST.banks[0], MOVED))
    assert maps.current == FIRST
    assert not maps.reach(1)
    assert maps.reach(2)
    assert not maps.reach(2)
    assert maps.current.banks[1] == MOVED


def test_an_epoch_that_was_given_up_never_runs(maps: EpochPlacements) -> None:
    maps.learn(frame(2))
    maps.learn(frame(3))
    assert maps.reach(3)
    with pytest.raises(ProtocolError, match="epoch 2, which was not announced"):
        maps.reach(2)


def test_an_epoch_may_follow_one_whose_header_is_on_the_way(maps: EpochPlacements) -> None:
    maps.learn(frame(2))
    assert maps.learn(frame(3, base=2, place=1)).epoch == 3
    assert maps.reach(2)
    assert maps.reach(3)


def test_a_generation_begins_anew(maps: EpochPlacements) -> None:
    maps.learn(frame(2))
    maps.start(replace(FIRST, epoch=7))
    assert maps.current.epoch == 7
    with pytest.raises(ProtocolError, match="epoch 2"):
        maps.reach(2)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (frame(4, base=3), "follows 3, but 1 runs"),
        (frame(4, place=0), "in a wrong place"),
        (frame(4, place=5), "no maps"),
        (frame(4, place=-1), "no maps"),
    ],
)
def test_nonsense_is_refused(maps: EpochPlacements, bad: NewEpoch, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        maps.learn(bad)
    assert maps.current == FIRST
