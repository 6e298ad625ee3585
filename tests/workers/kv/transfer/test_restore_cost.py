"""What a tier's blocks cost beside computing them."""

from __future__ import annotations

import pytest

from workers.kv.transfer.fetch_cost import FORGET_S, UNMEASURED_COST, FetchCost
from workers.kv.transfer.restore_cost import RestoreCost


def test_a_tier_is_cheap_until_both_speeds_are_known() -> None:
    computing = FetchCost()
    cost = RestoreCost(computing, bytes_per_token=100.0)
    assert cost.tokens("host", 1000, 0.0) == pytest.approx(UNMEASURED_COST * 10)
    cost.observe("host", 1000, 0.5, 1.0)
    assert cost.tokens("host", 1000, 1.0) == pytest.approx(UNMEASURED_COST * 10)
    computing.observe_prefill(400, 2.0)
    assert cost.tokens("host", 1000, 1.0) == pytest.approx(0.5 * 200)
    assert cost.tokens("disk", 1000, 1.0) == pytest.approx(UNMEASURED_COST * 10)


def test_a_slow_tier_is_tried_again() -> None:
    computing = FetchCost()
    computing.observe_prefill(1000, 1.0)
    cost = RestoreCost(computing, bytes_per_token=100.0)
    cost.observe("disk", 100, 1.0, 10.0)
    assert cost.tokens("disk", 100, 10.0) == pytest.approx(1000)
    assert cost.tokens("disk", 100, 10.0 + FORGET_S) == pytest.approx(UNMEASURED_COST)
    cost.observe("disk", 10_000, 1.0, 11.0 + FORGET_S)  # the old one counts no more
    assert cost.tokens("disk", 100, 11.0 + FORGET_S) == pytest.approx(10)
