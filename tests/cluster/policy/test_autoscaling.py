"""The autoscaling policy alone: numbers in, a decision out."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from cluster.config.autoscale import AutoscaleSection, PoolLimits
from cluster.core.topology import Role
from cluster.policy.autoscaling import PoolHistory, PoolSample, Proposal, Urgency, decide

SECTION = AutoscaleSection(up_s=30.0, down_s=300.0, queue_s=5.0)


class Pool:
    """A pool whose workers report once a second."""

    def __init__(self, size: int = 4, least: int = 1, most: int = 16) -> None:
        self.history = PoolHistory(SECTION, PoolLimits(min_workers=least, max_workers=most))
        self.size = size
        self.now = 0.0

    def report(self, seconds: float, **numbers: Any) -> Proposal:
        """Time passes with these numbers; what the pool needs then."""
        for _ in range(round(seconds)):
            self.history.add(PoolSample(at_s=self.now, num_workers=self.size, **numbers))
            self.now += 1.0
        return self.history.proposal()

    def obey(self, seconds: float, use: Callable[[float], float]) -> list[int]:
        """Follow every proposal; a load that ``use`` gives by time, in workers, is divided."""
        sizes = [self.size]
        for _ in range(round(seconds)):
            self.size = self.report(1, kv_use=min(use(self.now) / self.size, 1.0)).wanted
            if self.size != sizes[-1]:
                sizes.append(self.size)
        return sizes


def test_nothing_is_known_before_the_first_numbers() -> None:
    pool = Pool()
    assert pool.history.proposal().urgency is Urgency.KEEP
    assert "no numbers" in pool.history.proposal().reason
    assert pool.report(20, kv_use=1.0).urgency is Urgency.KEEP  # not over ``up_s`` yet


def test_a_pool_grows_in_proportion_to_its_use() -> None:
    found = Pool().report(40, kv_use=0.9, seat_use=0.3)
    assert (found.urgency, found.wanted) == (Urgency.GROW, 6)  # 4 x 0.9 / 0.7 = 5.14
    assert found.reason == "KV use 90%, target 70%, over 30 s"


def test_the_largest_ratio_counts() -> None:
    found = Pool().report(40, kv_use=0.9, seat_use=0.3, slot_time=0.9)
    assert (found.wanted, found.reason[:13]) == (6, "slot time 90%")
    assert Pool().report(40, slot_time=0.9).wanted == 6
    assert Pool().report(40, kv_use=0.2, seat_use=0.95).reason.startswith("running sequences 95%")


def test_use_near_the_target_changes_nothing() -> None:
    for use in (0.65, 0.7, 0.76):
        assert Pool().report(1000, kv_use=use).urgency is Urgency.KEEP


def test_a_queue_makes_it_grow_at_once() -> None:
    pool = Pool()
    pool.report(60, kv_use=0.5, num_running=20.0)
    found = pool.report(6, kv_use=0.6, num_running=20.0, num_waiting=8.0)
    assert (found.urgency, found.wanted) == (Urgency.QUEUE, 6)  # 4 x 28 / 20 = 5.6
    assert found.reason == "2.0 sequences wait at each worker, above 1"


def test_a_long_queue_at_most_doubles_a_pool() -> None:
    assert Pool().report(10, kv_use=1.0, num_running=8.0, num_waiting=500.0).wanted == 8


def test_a_queue_that_shortens_fast_is_left_alone() -> None:
    pool = Pool()
    for waiting in range(60, 5, -5):
        pool.report(1, kv_use=0.6, num_running=20.0, num_waiting=float(waiting))
    assert pool.history.proposal().urgency is Urgency.KEEP


def test_a_pool_shrinks_after_the_whole_time_only() -> None:
    pool = Pool()
    assert pool.report(300, kv_use=0.2).urgency is Urgency.KEEP
    found = pool.report(2, kv_use=0.2)
    assert (found.urgency, found.wanted) == (Urgency.SHRINK, 2)  # 4 x 0.2 / 0.7 / 0.85 = 1.3
    assert found.reason == "for 300 s nothing waited, and 1.1 workers met the target"


@pytest.mark.parametrize("peak", [{"kv_use": 0.7}, {"kv_use": 0.2, "num_waiting": 4.0}])
def test_one_busy_time_puts_shrinking_off(peak: dict[str, float]) -> None:
    pool = Pool()
    pool.report(200, kv_use=0.2, num_running=4.0)
    pool.report(30, num_running=40.0, **peak)
    assert pool.report(280, kv_use=0.2, num_running=4.0).urgency is Urgency.KEEP
    assert pool.report(60, kv_use=0.2, num_running=4.0).urgency is Urgency.SHRINK


def test_fewer_workers_must_have_some_room() -> None:
    assert Pool(2).report(400, kv_use=0.33).urgency is Urgency.KEEP  # one would have 0.66 of 0.7
    assert Pool(2).report(400, kv_use=0.28).urgency is Urgency.SHRINK


@pytest.mark.parametrize(
    ("size", "use", "text"),
    [(4, 1.0, "but 4 is the limit"), (2, 0.0, "but 2 is the limit")],
)
def test_limits_are_kept_and_said(size: int, use: float, text: str) -> None:
    found = Pool(size, least=2, most=4).report(400, kv_use=use)
    assert (found.urgency, found.wanted) == (Urgency.KEEP, size)
    assert text in found.reason


@pytest.mark.parametrize(("size", "wanted"), [(9, 4), (1, 2)])
def test_a_pool_outside_its_limits_returns_at_once(size: int, wanted: int) -> None:
    found = Pool(size, least=2, most=4).report(1, kv_use=0.5)
    assert (found.urgency, found.wanted) == (Urgency.LIMITS, wanted)
    assert found.reason == f"{size} workers, allowed are 2 to 4"


def test_unknown_use_changes_nothing() -> None:
    found = Pool().report(1000)
    assert (found.urgency, found.reason) == (Urgency.KEEP, "no use is reported")


def test_a_change_begins_all_times_anew() -> None:
    pool = Pool()
    pool.report(60, kv_use=0.9)
    pool.size = 6
    assert pool.report(29, kv_use=0.9).urgency is Urgency.KEEP
    assert pool.report(2, kv_use=0.9).urgency is Urgency.GROW
    pool.history.restart()
    assert pool.report(29, kv_use=0.9).urgency is Urgency.KEEP


def test_noise_makes_no_changes() -> None:
    for seed in range(5):
        draw = random.Random(seed)
        pool = Pool(4)
        assert pool.obey(3600, lambda now, draw=draw: 2.6 + draw.gauss(0, 0.8)) == [4]  # type: ignore[misc]


def test_steps_of_load_are_followed() -> None:
    loads = [2.0, 6.0, 6.0, 1.0, 1.0]
    sizes = Pool(3).obey(5 * 900, lambda now: loads[int(now / 900)])
    assert max(sizes) in (9, 10)
    assert sizes[-1] in (2, 3)
    assert sizes.index(max(sizes)) <= 3
    assert len(sizes) <= 7


def test_growing_again_soon_makes_it_wait_longer() -> None:
    pool, changes = Pool(4), []
    busy = {"kv_use": 0.3, "num_running": 20.0, "num_waiting": 20.0}
    calm = {"kv_use": 0.2, "num_running": 20.0}
    for _ in range(4 * 3600):  # three workers are too few, though their use is low
        found = pool.report(1, **(busy if pool.size < 4 else calm))
        if found.wanted != pool.size:
            changes.append(pool.now)
            pool.size = 4 if found.wanted > pool.size else 3
    waits = [later - earlier for earlier, later in zip(changes[1::2], changes[2::2], strict=False)]
    assert waits[:4] == sorted(waits[:4])
    assert waits[-1] > 7 * waits[0] / 2
    assert max(waits) < 8 * SECTION.down_s + 60


def test_one_pool_changes_at_a_time_and_the_queue_comes_first() -> None:
    attention, expert = Pool(2), Pool(2)
    attention.report(40, kv_use=0.5, num_running=9.0, num_waiting=9.0)
    expert.report(40, slot_time=0.95)
    pools: dict[Role, PoolHistory] = {"expert": expert.history, "attention": attention.history}
    sizes: dict[Role, int] = {"expert": 2, "attention": 2}
    found = decide(pools, sizes)
    assert (found.changes, found.wanted) == ("attention", {"expert": 2, "attention": 4})
    assert found.reason == "attention: 4.5 sequences wait at each worker, above 1"
    attention.report(40, kv_use=0.5, num_running=9.0)
    found = decide(pools, sizes)
    assert (found.changes, found.wanted) == ("expert", {"expert": 4, "attention": 2})


def test_a_decision_to_keep_explains_every_pool() -> None:
    attention, expert = Pool(2), Pool(2)
    attention.report(40, kv_use=0.5, seat_use=0.1)
    expert.report(40, slot_time=0.25)
    found = decide({"attention": attention.history, "expert": expert.history}, {"attention": 2})
    assert found.changes is None
    assert found.reason == "attention: KV use 50%, target 70%; expert: slot time 25%, target 60%"
