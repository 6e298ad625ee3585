"""Dispatch metadata of random placements against plain Python: which worker computes which pair."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cluster.core.placement import FREE_SLOT, BankPlacement
from workers.dispatch.copies import CopyTables

MASK = (1 << 64) - 1
STEP = 0x9E3779B97F4A7C15
KEYS = st.integers(-(1 << 63), (1 << 63) - 1)


@st.composite
def placements(draw: st.DrawFn) -> BankPlacement:
    """Up to 4 devices, every expert on some of them, free slots between."""
    num_devices, num_experts = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    homes = [
        draw(st.lists(st.integers(0, num_devices - 1), min_size=1, max_size=4, unique=True))
        for _ in range(num_experts)
    ]
    maps: list[list[int]] = []
    for device in range(num_devices):
        held = [e for e in range(num_experts) if device in homes[e]]
        free = [FREE_SLOT] * draw(st.integers(0, 2))
        maps.append(draw(st.permutations(held + free)))
    weights = [draw(st.lists(st.integers(1, 9), min_size=len(h), max_size=len(h))) for h in homes]
    shares = [
        dict(zip(home, (w / sum(own) for w in own), strict=True))
        for home, own in zip(homes, weights, strict=True)
    ]
    return BankPlacement.from_maps(
        bank="mlp",
        layer=0,
        num_experts=num_experts,
        physical_to_logical=maps,
        split=[
            [0.0 if e == FREE_SLOT else shares[e][device] for e in slots]
            for device, slots in enumerate(maps)
        ],
        decode_device=[draw(st.sampled_from(home)) for home in homes],
    )


def splitmix64(value: int) -> int:
    """The published finaliser, in unsigned integers."""
    value = (value + STEP) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def expected_place(
    placement: BankPlacement, expert: int, is_prefill: bool, key: int
) -> tuple[int, int]:
    """(device, slot) of the copy that serves a pair."""
    copies = placement.logical_to_physical(expert)
    if not is_prefill:
        return next(c for c in copies if c[0] == placement.decode_device[expert])
    share = splitmix64((key + expert * STEP) & MASK) % (1 << 32)
    total = 0.0
    for device, slot in copies[:-1]:
        total += placement.split[device][slot]
        if share < round(total * (1 << 32)):
            return device, slot
    return copies[-1]


@given(placement=placements(), data=st.data())
def test_every_pair_goes_to_the_copy_that_the_maps_name(
    placement: BankPlacement, data: st.DataObject
) -> None:
    num_devices = len(placement.physical_to_logical)
    num_rows = data.draw(st.integers(0, 5))
    choices = st.integers(0, placement.num_experts - 1)
    ids = [[data.draw(choices) for _ in range(3)] for _ in range(num_rows)]
    keys = [data.draw(KEYS) for _ in range(num_rows)]
    prefill = [data.draw(st.booleans()) for _ in range(num_rows)]
    order = data.draw(st.permutations(range(num_devices)))
    tables = CopyTables.build(placement, {d: i for i, d in enumerate(order)}, torch.device("cpu"))
    slots, _ = tables.choose(
        torch.tensor(ids, dtype=torch.int64).view(num_rows, 3),
        torch.tensor(prefill, dtype=torch.bool),
        torch.tensor(keys, dtype=torch.int64),
    )
    expected = torch.full((num_devices, num_rows, 3), -1, dtype=torch.int32)
    for row in range(num_rows):
        for place, expert in enumerate(ids[row]):
            device, slot = expected_place(placement, expert, prefill[row], keys[row])
            expected[order.index(device), row, place] = slot
    assert torch.equal(slots, expected)
