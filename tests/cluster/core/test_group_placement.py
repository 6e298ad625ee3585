"""Parts of placements that step groups use."""

from __future__ import annotations

import pytest

from cluster.core.group_placement import bank_of, is_apart, joined, own_devices, part_on, serves
from cluster.core.placement import BankPlacement, BankShape, ExpertPlacement, contiguous

SHAPES = [BankShape(bank="mlp", layer=layer, num_experts=4) for layer in range(2)]


def make_apart() -> ExpertPlacement:
    """Devices 0 and 2 compute prompts, device 1 decodes."""
    parts = {"prefill": contiguous(SHAPES, 2), "decode": contiguous(SHAPES, 1)}
    return joined(parts, {"prefill": (0, 2), "decode": (1,)}, 3)  # type: ignore[arg-type]


def test_groups_are_joined_and_taken_apart_again() -> None:
    placement = make_apart()
    assert placement.banks[0].physical_to_logical == ((0, 1), (0, 1, 2, 3), (2, 3))
    assert placement.banks[0].decode_device == (1, 1, 1, 1)
    assert placement.banks[0].split == ((1, 1), (0, 0, 0, 0), (1, 1))
    assert is_apart(placement.banks[0])
    assert part_on(placement, (0, 2)) == contiguous(SHAPES, 2)
    assert part_on(placement, (1,)) == contiguous(SHAPES, 1)
    assert part_on(placement, (0,)) is None


@pytest.mark.parametrize(
    ("group", "devices"), [("prefill", {0, 2}), ("decode", {1}), ("", {0, 1, 2})]
)
def test_only_devices_of_a_group_serve_it(group: str, devices: set[int]) -> None:
    placement = make_apart()
    assert {d for d in range(3) if serves(placement, d, group)} == devices  # type: ignore[arg-type]
    for bank in placement.banks:
        own = bank_of(bank, group)  # type: ignore[arg-type]
        assert own.physical_to_logical == bank.physical_to_logical
        used = {d for d in range(3) if any(share > 0 for share in own.split[d])}
        if group:
            assert used | set(own.decode_device) == devices
        else:
            assert own is bank


def test_copies_of_the_other_group_serve_what_a_lost_device_held() -> None:
    """Prompts of experts 0 and 1 go to device 1, which then serves both groups."""
    left = make_apart().without_devices(frozenset({0}), 2)
    assert left is not None
    assert not is_apart(left.banks[0])
    assert left.banks[0].split == ((0, 0), (1, 1, 0, 0), (1, 1))
    assert bank_of(left.banks[0], "prefill").decode_device == (1, 1, 2, 2)
    left = make_apart().without_devices(frozenset({1}), 2)
    assert left is not None
    assert left.banks[0].decode_device == (0, 0, 2, 2)
    assert all(serves(left, d, "decode") == serves(left, d, "prefill") for d in range(3))


def test_a_prompt_copy_that_no_decode_uses_stays_the_copy_of_prompts() -> None:
    bank = BankPlacement.from_maps(
        bank="mlp",
        layer=0,
        num_experts=2,
        physical_to_logical=((0, 1), (1, 0), (-1, 1)),
        split=((0.25, 0), (0.5, 0.75), (0, 0.5)),
        decode_device=(0, 0),
    )
    assert bank_of(bank, "prefill").decode_device == (0, 1)
    assert bank_of(bank, "decode").split == ((1, 1), (0, 0), (0, 0))


def test_devices_are_shared_if_a_group_has_none() -> None:
    assert own_devices(["prefill", "decode", "prefill", ""]) == {"prefill": [0, 2], "decode": [1]}
    assert own_devices(["", "", ""]) is None
    assert own_devices(["prefill", "", "prefill"]) is None
