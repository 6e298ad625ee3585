"""``StepTimes``: steps with decode and prompt rows."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.sizing.mixed_step import PoolSizes, RankRows, StepTimes
from cluster.sizing.roofline import (
    BankSize,
    DeviceSpec,
    HostTime,
    ModelSize,
    colocated_step,
    disaggregated_step,
)

BANK = BankSize(num_experts=8, top_k=2, expert_values=1000, in_values=10, out_values=10)
MODEL = ModelSize(banks=(BANK,) * 4, attention_values=500, kv_bytes_per_token=16, itemsize=2)
DEVICE = DeviceSpec(
    name="slow",
    bandwidth_bytes_s=1e6,
    flops_s=1e9,
    link_bytes_s=1e9,
    latency_s=1e-6,
    message_s=1e-6,
    host=HostTime(step_s=1e-3, row_s=1e-5, expert_s=2e-3),
)
ONE_EACH = PoolSizes(num_attention=1, num_experts=1)


@pytest.mark.parametrize("num_micro_batches", [1, 2])
@pytest.mark.parametrize("is_colocated", [False, True])
def test_many_decode_rows_take_the_time_of_the_roofline(
    is_colocated: bool, num_micro_batches: int
) -> None:
    """Every expert is activated, so that no choice of experts is left to chance."""
    pools = PoolSizes(num_attention=2, num_experts=2, is_colocated=is_colocated)
    ranks = [RankRows(128, 128, 128 * 100)] * 2
    found = StepTimes(MODEL, pools, DEVICE).step(
        ranks, has_prefill=False, num_micro_batches=num_micro_batches
    )
    if is_colocated:
        expected = colocated_step(MODEL, 256, 100, num_workers=2, device=DEVICE)
    else:
        expected = disaggregated_step(
            MODEL, 256, 100, num_attention=2, num_experts=2, device=DEVICE
        )
    assert found.host_s == pytest.approx(expected.host_s)
    if num_micro_batches == expected.num_micro_batches:
        assert found.attention_s == pytest.approx(expected.attention_s)
        assert found.exchange_s == pytest.approx(expected.exchange_s)
        assert found.step_s == pytest.approx(expected.step_s, rel=0.01)


def test_a_step_waits_for_the_rank_with_the_most_work() -> None:
    times = StepTimes(MODEL, replace(ONE_EACH, num_attention=2), DEVICE)
    busy, idle = RankRows(10, 10, 5000), RankRows(10, 10, 10)
    both = times.step([idle, busy], has_prefill=False)
    assert both.attention_s == times.step([busy, busy], has_prefill=False).attention_s
    assert both.attention_s > times.step([idle, idle], has_prefill=False).attention_s


def test_few_rows_load_one_of_several_expert_workers_most() -> None:
    """One row of top-2 on four workers with two experts each: one or two slots on the busiest."""
    times = StepTimes(MODEL, PoolSizes(num_attention=1, num_experts=4), DEVICE)
    mean_s = 4 * 2 * DEVICE.read_s(2000) / 4
    assert 1.5 * mean_s < times.experts_s(1) < 4 * mean_s
    assert times.experts_s(256) == pytest.approx(4 * 2 * DEVICE.read_s(2000), rel=0.01)


def test_prompt_rows_cost_operations_and_launches() -> None:
    launches = replace(DEVICE, launch_s=1.0, kernel_s=1e-9, flops_s=1e6)
    times = StepTimes(MODEL, ONE_EACH, launches)
    graph = times.step([RankRows(1, 1, 1)], has_prefill=False)
    prompt = times.step([RankRows(1, 1, 1)], has_prefill=True)
    assert graph.attention_s < 0.1
    assert prompt.attention_s >= 4 * 12 * launches.launch_s
    long = times.step([RankRows(100_000, 1, 1)], has_prefill=True)
    assert long.attention_s == pytest.approx(2 * 1e5 * 500 / 1e6, rel=0.1)


def test_equal_seeds_give_equal_times() -> None:
    rows = (3, 17, 70, 71, 1000)
    pools = PoolSizes(num_attention=1, num_experts=3)
    first, second = (StepTimes(MODEL, pools, DEVICE, seed=4) for _ in range(2))
    assert [first.experts_s(n) for n in rows] == [second.experts_s(n) for n in rows]
    assert first.experts_s(1000) <= first.experts_s(1023)


def test_unbalanced_experts_take_longer() -> None:
    even = StepTimes(MODEL, ONE_EACH, DEVICE).experts_s(50)
    uneven = StepTimes(MODEL, ONE_EACH, DEVICE, balancedness=0.5).experts_s(50)
    assert uneven == pytest.approx(2 * even)
