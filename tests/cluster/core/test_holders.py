"""Which workers a new one can read its experts from."""

from __future__ import annotations

from collections.abc import Sequence

from cluster.core.codec import from_plain, to_plain
from cluster.core.holders import ExpertHolder, expert_holders
from cluster.core.placement import BankPlacement, ExpertPlacement
from cluster.core.topology import Member, Role


def member(name: str, device: int) -> Member:
    role: Role = "expert" if device >= 0 else "attention"
    address = f"127.0.0.1:{9000 + device}" if device >= 0 else ""
    return Member(name=name, role=role, rank=0, device=device, weights_address=address)


def placement(*maps: Sequence[Sequence[int]]) -> ExpertPlacement:
    banks = (
        BankPlacement.from_maps(bank="mlp", layer=i, num_experts=4, physical_to_logical=rows)
        for i, rows in enumerate(maps)
    )
    return ExpertPlacement(epoch=1, banks=tuple(banks))


MEMBERS = (member("attention-0", -1), member("expert-0", 0), member("expert-1", 1))
CURRENT = placement([[0, 1], [2, 3, 0]], [[3, 2], [1, 0]])


def test_each_holder_is_named_with_what_the_new_worker_is_to_hold() -> None:
    target = placement([[-1, 1], [-1, 3, -1], [0, 2]], [[3, 2], [1, 0], []])
    found = expert_holders(MEMBERS, CURRENT, target, 2)
    assert found == (
        ExpertHolder(name="expert-0", address="127.0.0.1:9000", experts=((0,), ())),
        ExpertHolder(name="expert-1", address="127.0.0.1:9001", experts=((0, 2), ())),
    )
    assert from_plain(to_plain(found), tuple[ExpertHolder, ...]) == found


def test_a_worker_that_holds_none_of_them_is_left_out() -> None:
    target = placement([[0, 1], [-1, 3, 0], [2]], [[3, 2], [1, 0], []])
    assert [h.name for h in expert_holders(MEMBERS, CURRENT, target, 2)] == ["expert-1"]


def test_a_new_worker_in_a_lost_ones_place_is_no_holder_itself() -> None:
    (found,) = expert_holders(MEMBERS, CURRENT, CURRENT, 1)
    assert found.name == "expert-0"
    assert found.experts == ((0,), ())
    assert expert_holders((), CURRENT, CURRENT, 1) == ()


def test_attention_workers_hold_nothing() -> None:
    assert expert_holders(MEMBERS, CURRENT, CURRENT, -1) == ()
