"""Which copy serves a row: decode table, split weights, and the hash."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from cluster.core.errors import ProtocolError
from cluster.core.group_placement import bank_of, serves
from cluster.core.placement import BankPlacement, ExpertPlacement
from cluster.core.topology import Generation, Member
from workers.dispatch.copies import CopyTables, EpochTables, mix64
from workers.dispatch.expert_maps import ExpertMaps
from workers.requests.step_header import Grant, Grants, StepHeader

CPU = torch.device("cpu")


def make_placement() -> BankPlacement:
    """Expert 0 on three devices, expert 1 on two, expert 2 on one."""
    return BankPlacement.from_maps(
        bank="mlp",
        layer=0,
        num_experts=3,
        physical_to_logical=[[0, 1, -1], [1, 0, -1], [2, -1, 0]],
        split=[[0.5, 0.3, 0.0], [0.7, 0.375, 0.0], [1.0, 0.0, 0.125]],
        decode_device=[1, 0, 2],
    )


def test_hash_is_fixed() -> None:
    """These numbers are part of the protocol: a retry elsewhere must pick the same copy."""
    values = mix64(torch.tensor([0, 1, -1, 2**62]))
    assert values.tolist() == [
        -2152535657050944081,
        -7995527694508729151,
        -1956407806741107680,
        47939714376772075,
    ]


def test_decode_rows_take_the_copy_of_the_decode_table() -> None:
    tables = CopyTables.build(make_placement(), {0: 0, 1: 1, 2: 2}, CPU)
    ids = torch.tensor([[0, 1], [2, 0]])
    decode = torch.zeros(2, dtype=torch.bool)
    slots = tables.choose(ids, decode, torch.zeros(2).long())[0]
    assert torch.equal(slots, tables.decode_slots[:, ids])
    assert slots.tolist() == [
        [[-1, 1], [-1, -1]],
        [[1, -1], [-1, 1]],
        [[-1, -1], [0, -1]],
    ]
    assert slots.is_contiguous()


def test_every_pair_goes_to_exactly_one_copy() -> None:
    tables = CopyTables.build(make_placement(), {0: 0, 1: 1, 2: 2}, CPU)
    ids = torch.randint(0, 3, (200, 4))
    prefill = torch.arange(200) % 2 == 0
    keys = torch.randint(-(2**62), 2**62, (200,))
    held = torch.tensor(make_placement().physical_to_logical)
    for slots in (tables.choose(ids, prefill, keys)[0], tables.decode_slots[:, ids]):
        assert torch.equal((slots >= 0).sum(0), torch.ones_like(ids))
        for rank in range(3):
            here = slots[rank] >= 0
            assert torch.equal(held[rank][slots[rank][here].long()], ids[here])


def test_prefill_shares_follow_the_split_within_sampling_error() -> None:
    placement = make_placement()
    tables = CopyTables.build(placement, {0: 0, 1: 1, 2: 2}, CPU)
    num_rows = 40_000
    keys = mix64(torch.arange(num_rows))
    ids = torch.tensor([[0, 1]]).expand(num_rows, 2)
    slots = tables.choose(ids, torch.ones(num_rows, dtype=torch.bool), keys)[0]
    for expert in (0, 1):
        for device, slot in placement.logical_to_physical(expert):
            share = placement.split[device][slot]
            found = float((slots[device, :, expert] == slot).float().mean())
            sigma = (share * (1 - share) / num_rows) ** 0.5
            assert abs(found - share) < 4 * sigma


def test_the_choice_depends_on_row_and_expert_alone() -> None:
    tables = CopyTables.build(make_placement(), {0: 0, 1: 1, 2: 2}, CPU)
    ids = torch.randint(0, 3, (50, 2))
    keys = torch.randint(-(2**62), 2**62, (50,))
    prefill = torch.ones(50, dtype=torch.bool)
    whole = tables.choose(ids, prefill, keys)[0]
    order = torch.randperm(50)
    again = tables.choose(ids[order], prefill, keys[order])[0]
    assert torch.equal(whole[:, order], again)
    swapped = tables.choose(ids.flip(1), prefill, keys)[0]
    assert torch.equal(whole.flip(2), swapped)


def test_devices_are_found_by_their_place_among_the_ranks() -> None:
    lost = make_placement().without_devices(frozenset({1}))
    assert lost is not None
    tables = CopyTables.build(lost, {0: 0, 2: 1}, CPU)
    ids = torch.tensor([[0, 1, 2]])
    slots = tables.decode_slots[:, ids]
    assert slots.tolist() == [[[0, 1, -1]], [[-1, -1, 0]]]


def test_a_device_without_a_rank_is_refused() -> None:
    with pytest.raises(ProtocolError, match="device 1"):
        CopyTables.build(make_placement(), {0: 0, 2: 1}, CPU)


def test_thresholds_are_the_sums_of_the_shares() -> None:
    tables = CopyTables.build(make_placement(), {0: 0, 1: 1, 2: 2}, CPU)
    whole = 1 << 32
    assert tables.thresholds.tolist() == [
        [whole // 2, whole * 7 // 8, whole],
        [round(0.3 * whole), whole, whole],
        [whole] * 3,
    ]
    assert tables.copy_rank.tolist() == [[0, 1, 2], [0, 1, -1], [2, -1, -1]]
    assert tables.copy_slot.tolist() == [[0, 1, 2], [1, 0, -1], [0, -1, -1]]


@pytest.mark.parametrize("shares", [(0.25, 0.75 - 5e-7), (0.5, 0.5 + 5e-7)])
def test_the_last_copy_takes_what_rounding_leaves(shares: tuple[float, float]) -> None:
    placement = BankPlacement.from_maps(
        bank="mlp",
        layer=0,
        num_experts=1,
        physical_to_logical=[[0], [0]],
        split=[[share] for share in shares],
    )
    tables = CopyTables.build(placement, {0: 0, 1: 1}, CPU)
    assert tables.thresholds.tolist()[0] == [round(shares[0] * 2**32), 2**32]


@pytest.mark.parametrize("row_key", [5, 7])  # an even and an odd hash
def test_a_hash_at_the_end_of_a_share_goes_to_the_next_copy(row_key: int) -> None:
    key = torch.tensor([row_key])
    share = int(mix64(key)) % 2**32  # of expert 0
    ids, prefill = torch.tensor([[0]]), torch.tensor([True])
    for end, copy in ((share, 1), (share + 1, 0)):
        first = end / 2**32
        placement = BankPlacement.from_maps(
            bank="mlp",
            layer=0,
            num_experts=1,
            physical_to_logical=[[0], [0]],
            split=[[first], [1.0 - first]],
        )
        tables = CopyTables.build(placement, {0: 0, 1: 1}, CPU)
        assert tables.choose(ids, prefill, key)[1].places == torch.tensor([[copy]])


def test_without_second_copies_there_is_no_choice() -> None:
    single = BankPlacement.from_maps(
        bank="mlp", layer=0, num_experts=2, physical_to_logical=[[0], [1]]
    )
    assert not CopyTables.build(single, {0: 0, 1: 1}, CPU).has_choice
    assert CopyTables.build(make_placement(), {0: 0, 1: 1, 2: 2}, CPU).has_choice


def make_header(epoch: int, oldest_epoch: int) -> StepHeader:
    return StepHeader(
        generation=1, step=9, epoch=epoch, oldest_epoch=oldest_epoch, grants=Grants.of({0: Grant()})
    )


def test_a_step_drops_the_tables_of_older_epochs() -> None:
    tables = EpochTables[str]()
    for epoch in (4, 5, 6):
        tables.add(1, epoch, f"of {epoch}")
    assert tables.begin_step(make_header(6, 5)) == "of 6"
    assert tables.begin_step(make_header(5, 5)) == "of 5"
    with pytest.raises(ProtocolError, match=r"step 9 runs in epoch 4, known are \[5, 6\]"):
        tables.begin_step(make_header(4, 4))


def test_another_generation_has_tables_of_its_own() -> None:
    tables = EpochTables[str]()
    tables.add(1, 5, "of 5")
    tables.add(2, 6, "of 6")
    assert tables.begin_step(make_header(6, 1)) == "of 6"
    with pytest.raises(ProtocolError, match="known are"):
        tables.begin_step(make_header(5, 1))


def test_maps_follow_the_step_group_of_a_worker() -> None:
    """Both sides agree which ranks serve a group, and a worker that changes its group has other
    tables, although ranks and placement are the same."""
    bank = BankPlacement.from_maps(
        bank="mlp",
        layer=0,
        num_experts=2,
        physical_to_logical=[[0, 1], [1, 0], [0, 1]],
        split=[[0.5, 0.5], [0.5, 0.5], [0.0, 0.0]],
        decode_device=[2, 2],
    )
    members = [
        Member(name="a", role="attention", rank=0, group="prefill"),
        *(Member(name=f"e{d}", role="expert", rank=d, device=d) for d in range(3)),
    ]
    generation = Generation(number=1, members=tuple(members))
    maps = ExpertMaps("sum", CPU, None)
    for epoch, banks, group, ranks, has_choice in (
        (1, (bank,), "prefill", (0, 1), True),
        (2, (bank,), "decode", (2,), True),
        (3, (replace(bank, decode_device=(0, 1)),), "decode", (0, 1), True),
        (4, (replace(bank, decode_device=(0, 1)),), "prefill", (0, 1), True),
        (5, (replace(bank, decode_device=(0, 0)),), "decode", (0,), False),
    ):
        placement = ExpertPlacement(epoch=epoch, banks=banks)
        maps.set_placement(placement, generation, group)  # type: ignore[arg-type]
        assert maps.ranks == ranks
        assert [d for d in range(3) if serves(placement, d, group)] == [*ranks]  # type: ignore[arg-type]
        (tables,) = maps._epochs.begin_step(make_header(epoch, epoch)).tables
        assert tables.has_choice == has_choice
        index = {rank: i for i, rank in enumerate(ranks)}
        fresh = CopyTables.build(bank_of(banks[0], group), index, CPU)  # type: ignore[arg-type]
        assert torch.equal(tables.thresholds, fresh.thresholds)
        assert torch.equal(tables.decode_slots, fresh.decode_slots)
