"""Expert maps: contiguous plans, survivors' maps, placement files."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from cluster.core.errors import ConfigError
from cluster.core.placement import (
    FREE_SLOT,
    BankPlacement,
    BankShape,
    ExpertPlacement,
    contiguous,
)
from cluster.core.placement_file import load_placement

BANKS = [BankShape(bank="mlp", layer=layer, num_experts=8) for layer in range(2)]


def check_maps(bank: BankPlacement) -> None:
    """The invariants every placement keeps."""
    for expert in range(bank.num_experts):
        copies = bank.logical_to_physical(expert)
        assert copies
        assert len({d for d, _ in copies}) == len(copies) == bank.replica_count[expert]
        assert all(bank.physical_to_logical[d][s] == expert for d, s in copies)
        assert sum(bank.split[d][s] for d, s in copies) == pytest.approx(1.0)
        assert bank.decode_device[expert] in {d for d, _ in copies}


@pytest.mark.parametrize("devices", range(1, 9))
@pytest.mark.parametrize("redundant", [0, 1, 3, 8])
def test_contiguous_plan_places_every_expert(devices: int, redundant: int) -> None:
    placement = contiguous(BANKS, devices, redundant)
    assert len(placement.banks) == 2
    for bank in placement.banks:
        check_maps(bank)
        assert bank.num_devices == devices


def test_contiguous_plan_of_four_experts_on_two_devices() -> None:
    placement = contiguous([BankShape(bank="mlp", layer=0, num_experts=4)], 2, 1)
    assert placement.num_devices == 2
    (bank,) = placement.banks
    assert bank.physical_to_logical == ((0, 1, 2), (2, 3, 0))
    assert bank.logical_to_physical(2) == ((0, 2), (1, 0))
    assert bank.replica_count == (2, 1, 2, 1)
    assert bank.decode_device == (0, 0, 1, 1)


def test_spare_slots_without_a_new_expert_stay_free() -> None:
    (bank,) = contiguous([BankShape(bank="mlp", layer=0, num_experts=2)], 2, 4).banks
    assert bank.physical_to_logical == ((0, 1, -1, -1, -1), (1, 0, -1, -1, -1))
    assert list(bank.copies()) == [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)]


def test_more_devices_than_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="more workers than can ever have work"):
        contiguous(BANKS, 9)


def test_survivors_keep_their_slots_and_take_the_shares() -> None:
    rng = random.Random(0)
    for _ in range(50):
        placement = contiguous(BANKS, 4, rng.randint(2, 6))
        lost = frozenset([rng.randrange(4)])
        left = placement.without_devices(lost, epoch=2)
        assert left is not None
        assert left.epoch == 2
        for before, after in zip(placement.banks, left.banks, strict=True):
            check_maps(after)
            for device in range(4):
                same = after.physical_to_logical[device] == before.physical_to_logical[device]
                empty = set(after.physical_to_logical[device]) == {FREE_SLOT}
                assert empty if device in lost else same


def test_losing_the_only_copy_leaves_no_placement() -> None:
    assert contiguous(BANKS, 2).without_devices(frozenset([0]), epoch=2) is None


def placement_file(path: Path, **changes: object) -> Path:
    data: dict[str, Any] = contiguous(BANKS, 2).to_dict()
    for bank in data["banks"]:
        for optional in ("split", "decode_device", "num_experts"):
            del bank[optional]
    data.update(changes)
    path.write_text(json.dumps(data))
    return path


def test_placement_file_without_optional_maps_is_filled_in(tmp_path: Path) -> None:
    placement = load_placement(placement_file(tmp_path / "p.json"), BANKS, 2)
    assert placement == contiguous(BANKS, 2)


def test_placement_survives_json() -> None:
    placement = contiguous(BANKS, 3, 2)
    assert ExpertPlacement.from_dict(json.loads(json.dumps(placement.to_dict()))) == placement


@pytest.mark.parametrize(
    ("banks", "devices", "changes", "words"),
    [
        (BANKS, 3, {}, "2 devices, the cluster has 3"),
        (BANKS[:1], 2, {}, "not a bank of this model"),
        (
            [BankShape(bank="mlp", layer=i, num_experts=9) for i in range(2)],
            2,
            {},
            "num_expert_slots",
        ),
        (BANKS, 2, {"banks": []}, "exactly the model's banks"),
        (BANKS, 2, {"schema": 9}, "must be 1"),
        (BANKS, 2, {"banks": [{"bank": "mlp"}]}, "not a placement"),
        (BANKS, 2, {"banks": 7}, "not a placement"),
        (BANKS, 2, {"banks": [{"bank": "mlp", "layer": math.inf}]}, "not a placement"),
    ],
)
def test_bad_placement_files_are_refused_by_rule(
    tmp_path: Path, banks: list[BankShape], devices: int, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        load_placement(placement_file(tmp_path / "p.json", **changes), banks, devices)


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "\x00\x01", "[" * 100_000])
def test_rubbish_is_not_a_placement(tmp_path: Path, content: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match="placement_file"):
        load_placement(path, BANKS, 2)


@pytest.mark.parametrize(
    ("maps", "extra", "words"),
    [
        ([[0, 0, 1]], {}, "twice"),
        ([[0, 5]], {}, "must be below"),
        ([[0]], {}, r"num_expert_slots \(1\) must be at least num_experts \(2\) in total"),
        ([[0, -1]], {}, "no copy"),
        ([[0, 1]], {"split": [[1.0]]}, "split must match"),
        ([[0, 1], [0, -1]], {"split": [[0.2, 1.0], [0.2, 0.0]]}, "must sum to 1"),
        ([[0, 1], [0, -1]], {"split": [[1.0, 1.0]]}, "split must have a row for each device"),
        ([[0, 1], [0, -1]], {"split": [[1.5, 1.0], [-0.5, 0.0]]}, "must be from 0 to 1"),
        ([[0, 1]], {"split": [[math.nan, 1.0]]}, "must be from 0 to 1"),
        ([[0, 1], [0, -1]], {"decode_device": [0, 1]}, "decode_device holds no expert 1"),
        ([[0, 1]], {"decode_device": [0]}, "must have one for each of the 2 experts"),
    ],
)
def test_broken_maps_are_refused(maps: list[list[int]], extra: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        BankPlacement.from_maps(
            bank="mlp", layer=0, num_experts=2, physical_to_logical=maps, **extra
        )


def test_a_placement_without_banks_has_no_devices() -> None:
    assert ExpertPlacement(epoch=1, banks=()).num_devices == 0


def test_survivors_of_copies_without_a_share_get_equal_shares() -> None:
    bank = BankPlacement.from_maps(
        bank="mlp",
        layer=0,
        num_experts=1,
        physical_to_logical=[[0], [0], [0]],
        split=[[1.0], [0.0], [0.0]],
    )
    left = bank.without_devices(frozenset({0}))
    assert left is not None
    assert left.split == ((0.0,), (0.5,), (0.5,))


def test_the_lowest_devices_take_the_experts_that_are_left_over() -> None:
    (bank,) = contiguous([BankShape(bank="mlp", layer=0, num_experts=5)], 3, 2).banks
    assert bank.physical_to_logical == ((0, 1, 2, 3), (2, 3, 4, 0), (4, 0, 1, FREE_SLOT))
    assert bank.decode_device == (0, 0, 1, 1, 2)


def test_a_file_without_an_epoch_is_the_first(tmp_path: Path) -> None:
    path = placement_file(tmp_path / "p.json")
    data = json.loads(path.read_text())
    del data["epoch"]
    path.write_text(json.dumps(data))
    assert load_placement(path, BANKS, 2).epoch == 1


def test_survivors_divide_the_lost_share_in_proportion() -> None:
    bank = BankPlacement.from_maps(
        bank="mlp",
        layer=0,
        num_experts=2,
        physical_to_logical=[[0, 1], [1, 0], [FREE_SLOT, 1], [0, 1]],
        split=[[0.5, 0.1], [0.4, 0.4], [0.0, 0.1], [0.1, 0.4]],
        decode_device=[0, 3],
    )
    left = bank.without_devices(frozenset({0}))
    assert left is not None
    assert left.physical_to_logical == ((FREE_SLOT, FREE_SLOT), (1, 0), (FREE_SLOT, 1), (0, 1))
    assert [list(map(pytest.approx, row)) for row in left.split] == [
        [0.0, 0.0],
        [0.4 / 0.9, 0.8],
        [0.0, 0.1 / 0.9],
        [0.2, 0.4 / 0.9],
    ]
    assert left.decode_device == (1, 3)


def test_experts_that_a_device_lacks() -> None:
    shapes = [BankShape(bank="mlp", layer=layer, num_experts=4) for layer in (0, 1)]
    maps = contiguous(shapes, 2, 2)  # device 1: 2, 3, 0, 1
    assert not list(maps.missing(1, [(2, 3, 0, 1), (2, 3, 0, 1)]))
    assert not list(maps.missing(1, [[2, 3, 0, 1], [2, 3, 0, 1, 9]]))
    assert list(maps.missing(1, [(2, 0, -1, 1)])) == [
        *((0, 1, 3), (0, 2, 0)),
        *((1, 0, 2), (1, 1, 3), (1, 2, 0), (1, 3, 1)),
    ]


class UncheckedPlacement(BankPlacement, frozen=True, kw_only=True):
    """A placement that may break rules."""

    def __post_init__(self) -> None:
        """Check nothing."""


def test_columns_and_rules_agree_on_what_is_valid() -> None:
    """A placement is checked as a whole; the rules only say what is wrong."""
    rng = random.Random(3)
    num_valid = 0
    for _ in range(600):
        bank = contiguous([BankShape(bank="mlp", layer=0, num_experts=6)], 3, 1).banks[0]
        rows: list[Any] = [list(row) for row in bank.physical_to_logical]
        split: list[Any] = [list(row) for row in bank.split]
        decode: list[Any] = list(bank.decode_device)
        for _ in range(rng.randint(0, 2)):
            device = rng.randrange(min(len(rows), len(split)))
            change = rng.randrange(6)
            if change == 0:
                rows[device][rng.randrange(len(rows[device]))] = rng.randint(-2, 6)
            elif change == 1:
                split[device][rng.randrange(len(split[device]))] = rng.choice([0.5, -1.0, math.nan])
            elif change == 2:
                decode[rng.randrange(5)] = rng.randint(-1, 3)
            elif change == 3:
                rng.choice([rows[device], split[device], decode]).pop()
            elif change == 4:
                rng.choice([rows, split]).pop()
        fields = {
            "physical_to_logical": tuple(map(tuple, rows)),
            "split": tuple(map(tuple, split)),
            "decode_device": tuple(decode),
        }
        made = UncheckedPlacement(**{**structs.asdict(bank), **fields})
        try:
            made._refuse()
        except ConfigError:
            assert not made._is_valid(), fields
        else:
            num_valid += 1
            assert made._is_valid(), fields
    assert 50 < num_valid < 550


@pytest.mark.parametrize("field", ["physical_to_logical", "decode_device"])
def test_numbers_that_no_machine_counts_with_break_a_rule(field: str) -> None:
    bank = contiguous(BANKS, 2).banks[0]
    maps: Any = getattr(bank, field)
    first = (1 << 63, *maps[0][1:]) if field == "physical_to_logical" else 1 << 63
    with pytest.raises(ConfigError):
        structs.replace(bank, **{field: (first, *maps[1:])})
