"""Blocks in host memory: bounded, by tenant, in the order of their worth."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from workers.kv.tiers.host import HostTier
from workers.kv.tiers.index import IDLE_S, TierTurn
from workers.kv.tiers.tier import Tier
from workers.kv.tiers.tiers import KvTiers
from workers.kv.turns import KeepHints, TurnUse
from workers.requests.block_hash import state_key

BLOCK_BYTES = 10


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def data_of(name: bytes, size: int = BLOCK_BYTES) -> Tensor:
    """The only right contents of an item."""
    draw = random.Random(name)
    return torch.tensor([draw.randrange(256) for _ in range(size)], dtype=torch.uint8)


def names_of(chain: str) -> list[bytes]:
    """Hashes of blocks, by letter and what stands before it."""
    return [chain[: end + 1].encode().ljust(32, b".") for end in range(len(chain))]


def use_of(chain: str, tenant: str = "", keep_s: float | None = None) -> TurnUse:
    names = names_of(chain)
    hints = KeepHints(tenant=tenant, keep_s=keep_s)
    return TurnUse(names=names, num_prompt=len(names), hints=hints)


def leave(tier: Tier | KvTiers, use: TurnUse) -> int:
    """A turn leaves all blocks of its prefix; returns how many were kept."""
    turn = tier.begin(use)
    kept = put_all(tier, turn, use.names)
    tier.end(turn)
    if isinstance(tier, Tier):
        tier.check_integrity()
    return kept


def put_all(tier: Tier | KvTiers, turn: TierTurn, names: Sequence[bytes]) -> int:
    for place, name in enumerate(names):
        if not tier.put(turn, name, names[place - 1] if place else None, data_of(name)):
            return place
    return len(names)


def known(tier: Tier, chain: str) -> int:
    """Blocks of a chain from the first on that a tier has."""
    return next((i for i, n in enumerate(names_of(chain)) if not tier.has(n)), len(chain))


def test_what_was_put_is_read() -> None:
    tiers = KvTiers(HostTier(10 * BLOCK_BYTES))
    assert leave(tiers, use_of("abc")) == 3
    names = names_of("abcd")
    assert tiers.tiers_of(names) == ["host"] * 3
    for name in names[:3]:
        held = tiers.read(name)
        assert held is not None
        assert torch.equal(held.data, data_of(name))
    assert tiers.read(names[3]) is None


def test_the_end_of_the_least_recent_prefix_gives_way() -> None:
    host = HostTier(4 * BLOCK_BYTES)
    leave(host, use_of("abc"))
    leave(host, use_of("xy"))
    assert (known(host, "abc"), known(host, "xy")) == (2, 2)
    assert host.num_bytes == 4 * BLOCK_BYTES


def test_a_turn_larger_than_the_tier_keeps_its_beginning() -> None:
    host = HostTier(3 * BLOCK_BYTES)
    leave(host, use_of("xy"))
    assert leave(host, use_of("abcde")) == 3
    assert (known(host, "abcde"), known(host, "xy")) == (3, 0)
    assert host.num_skipped == 2


def test_an_item_larger_than_the_tier_evicts_nothing() -> None:
    host = HostTier(3 * BLOCK_BYTES)
    leave(host, use_of("abc"))
    turn = host.begin(use_of("x"))
    assert not host.put(turn, names_of("x")[0], None, data_of(b"x", 4 * BLOCK_BYTES))
    host.end(turn)
    assert known(host, "abc") == 3


def test_blocks_that_were_there_do_not_give_way_to_those_behind_them() -> None:
    """A turn puts only those that the tier lacks."""
    host = HostTier(4 * BLOCK_BYTES)
    leave(host, use_of("abc"))
    names = names_of("abcd")
    host.forget([names[1]])
    leave(host, use_of("x"))
    turn = host.begin(use_of("abcd"))
    for place in (1, 3):
        assert host.put(turn, names[place], names[place - 1], data_of(names[place]))
    host.check_integrity()
    host.end(turn)
    assert (known(host, "abcd"), known(host, "x")) == (4, 0)


def test_a_block_without_the_one_before_it_is_not_kept() -> None:
    host = HostTier(3 * BLOCK_BYTES)
    turn = host.begin(use_of("ab"))
    first, second = names_of("ab")
    assert not host.put(turn, second, first, data_of(second))
    host.end(turn)
    assert host.num_bytes == 0


def test_a_tenant_gives_way_only_above_its_part() -> None:
    host = HostTier(6 * BLOCK_BYTES)
    leave(host, use_of("abcdef", "one"))
    leave(host, use_of("uvwxyz", "two"))
    assert (host.bytes_of("one"), host.bytes_of("two")) == (30, 30)
    for start in "0123456789":
        leave(host, use_of(f"{start}fgh", "two"))
    assert known(host, "abcdef") == 3
    assert host.bytes_of("one") == 30


def test_a_tenant_that_has_gone_gives_way_first() -> None:
    clock = Clock()
    host = HostTier(6 * BLOCK_BYTES, clock=clock)
    leave(host, use_of("abc", "one"))
    clock.now_s = IDLE_S
    leave(host, use_of("uvwxyz", "two"))
    assert (host.bytes_of("one"), host.bytes_of("two")) == (0, 60)


@pytest.mark.parametrize("has_ended", [True, False])
def test_a_tenant_that_left_nothing_is_forgotten(has_ended: bool) -> None:
    clock = Clock()
    host = HostTier(6 * BLOCK_BYTES, clock=clock)
    turn = host.begin(use_of("ab", "one"))
    put_all(host, turn, turn.use.names)
    host.forget(turn.use.names)
    if has_ended:
        host.end(turn)
    for _ in range(2):
        clock.now_s += IDLE_S
        leave(host, use_of("uv", "two"))
    if not has_ended:
        host.end(turn)
    assert host._order._orders.keys() == {"two"}


def test_kept_blocks_outlive_others_of_the_tenant() -> None:
    clock = Clock()
    host = HostTier(4 * BLOCK_BYTES, max_kept=2, clock=clock)
    leave(host, use_of("ab", keep_s=100.0))
    for start in "0123":
        leave(host, use_of(f"{start}f"))
    assert known(host, "ab") == 2
    clock.now_s = 100.0
    for start in "4567":
        leave(host, use_of(f"{start}f"))
    assert known(host, "ab") == 0


def test_what_must_be_forgotten_is_not_found() -> None:
    tiers = KvTiers(HostTier(10 * BLOCK_BYTES))
    use = use_of("abc")
    turn = tiers.begin(use)
    put_all(tiers, turn, use.names)
    tiers.forget(use.names[1:])  # while the turn goes on
    tiers.end(turn)
    assert tiers.tiers_of(use.names) == ["host"]
    tiers.host.check_integrity()


def test_a_state_goes_before_its_block() -> None:
    host = HostTier(5 * BLOCK_BYTES)
    use = use_of("abc")
    turn = host.begin(use)
    put_all(host, turn, use.names)
    state = state_key(use.names[-1])
    assert host.put(turn, state, use.names[-1], data_of(state, 2 * BLOCK_BYTES))
    host.end(turn)
    leave(host, use_of("x"))
    assert not host.has(state)
    assert known(host, "abc") == 3


def test_changes_name_what_came_and_went() -> None:
    host = HostTier(3 * BLOCK_BYTES)
    leave(host, use_of("abc"))
    assert host.take_touched() == names_of("abc")
    leave(host, use_of("x"))
    assert set(host.take_touched()) == {names_of("abc")[2], *names_of("x")}
    assert host.take_touched() == []


@pytest.mark.parametrize("seed", range(4))
def test_random_turns_keep_all_counts_right(seed: int) -> None:
    draw, clock = random.Random(seed), Clock()
    host = HostTier(20 * BLOCK_BYTES, max_kept=6, clock=clock)
    tenants: dict[str, set[str]] = {"one": set(), "two": set(), "three": set()}
    open_turns = []
    for _ in range(150):
        clock.now_s += draw.choice((0.0, 1.0, IDLE_S / 50))
        tenant = draw.choice(list(tenants))
        start = draw.choice([*tenants[tenant], "", ""]) if draw.random() < 0.7 else ""
        chain = tenant[:2] + start[2:] + "".join(draw.choices("abc", k=draw.randrange(1, 5)))
        use = use_of(chain[:12], tenant, keep_s=draw.choice((None, None, 0.0, 5.0)))
        turn = host.begin(use)
        put_all(host, turn, use.names)
        open_turns.append(turn)
        if draw.random() < 0.8:
            host.end(open_turns.pop(draw.randrange(len(open_turns))))
        if draw.random() < 0.05:
            host.forget(draw.sample(list(use.names), 1))
        host.check_integrity()
        assert host.num_bytes <= host.capacity_bytes
        tenants[tenant].add(chain[:12])
        for name in use.names:
            held = host.read(name)
            assert held is None or torch.equal(held, data_of(name))
    for turn in open_turns:
        host.end(turn)
    host.check_integrity()
