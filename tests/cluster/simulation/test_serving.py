"""``ServingSimulation``: a workload in virtual time."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import pytest

from cluster.config.cluster import EngineSection
from cluster.simulation.serving import ServingSimulation
from cluster.sizing.group_steps import GroupSizes, GroupSteps
from cluster.sizing.mixed_step import PoolSizes, StepTimes
from cluster.sizing.roofline import DeviceSpec
from cluster.workload.arrivals import Arrival, poisson
from cluster.workload.tally import Tally
from tests.cluster.sizing.test_mixed_step import DEVICE, MODEL
from workers.engine.micro_batches import MicroBatchRule

SLOW_PRODUCTS = replace(DEVICE, flops_s=5e6)
"""Rows of prompts take long, compared with reads of weights."""


def make_simulation(
    num_attention: int = 1,
    num_kv_blocks: int = 1000,
    device: DeviceSpec = DEVICE,
    **more: float,
) -> ServingSimulation:
    pools = PoolSizes(num_attention=num_attention, num_experts=2)
    return ServingSimulation(
        StepTimes(MODEL, pools, device),
        EngineSection(max_num_seqs=8, max_num_batched_tokens=64),
        num_attention=num_attention,
        num_kv_blocks=num_kv_blocks,
        max_model_len=1024,
        micro_batches=MicroBatchRule(),
        **more,  # type: ignore[arg-type]
    )


def with_groups(num_prefill_experts: int = 0, device: DeviceSpec = DEVICE) -> ServingSimulation:
    """One prefill worker, one decode worker and two expert workers."""
    pools = PoolSizes(num_attention=2, num_experts=2)
    sizes = GroupSizes(1, 1, 2, num_prefill_experts)
    return ServingSimulation(
        StepTimes(MODEL, pools, device),
        EngineSection(max_num_seqs=8, max_num_batched_tokens=64),
        num_attention=2,
        num_kv_blocks=400,
        max_model_len=1024,
        micro_batches=MicroBatchRule(),
        groups=GroupSteps(MODEL, sizes, device),
    )


def run(simulation: ServingSimulation, arrivals: list[Arrival]) -> Tally:
    tally = Tally({})
    simulation.run(arrivals, tally, lambda: None)
    return tally


def test_one_request_takes_its_steps() -> None:
    """100 prompt tokens in chunks of 64, then a step a token."""
    simulation = make_simulation(entry_s=0.5)
    tally = run(simulation, [Arrival(1.0, 100, 5)])
    assert simulation.shares.num_steps == 2 + 4
    assert simulation.shares.num_rows == 104
    results = tally.results(simulation.now_s)
    assert simulation.now_s == pytest.approx(1.5 + simulation.shares.busy_s)
    assert results["e2e_ms"]["mean"] == pytest.approx(1e3 * (simulation.now_s - 1.0))
    assert tally.times_ms["itl"].count == 4


@pytest.mark.parametrize("num_attention", [1, 3])
def test_every_token_of_random_requests_comes_once(num_attention: int) -> None:
    """Also where few KV blocks preempt requests."""
    draw = random.Random(num_attention)
    arrivals = [Arrival(0.02 * i, draw.randint(1, 150), draw.randint(1, 40)) for i in range(60)]
    simulation = make_simulation(num_attention, num_kv_blocks=24)
    tally = run(simulation, arrivals)
    assert tally.successful == 60
    assert tally.output_tokens == sum(a.output_len for a in arrivals)
    assert tally.times_ms["itl"].count == tally.output_tokens - 60
    again = make_simulation(num_attention, num_kv_blocks=24)
    assert run(again, arrivals).times_ms["ttft"].summary() == tally.times_ms["ttft"].summary()


def test_a_request_that_no_worker_can_hold_fails() -> None:
    tally = run(make_simulation(num_kv_blocks=4), [Arrival(0.0, 60, 5), Arrival(0.0, 60, 4)])
    assert tally.failures == {"too_long": 1}
    assert tally.successful == 1


def test_concurrency_is_limited() -> None:
    tally = run(make_simulation(max_concurrency=2), [Arrival(0.0, 8, 8)] * 6)
    assert tally.peak_in_flight == 2
    assert tally.late_ms.count == 6
    assert (tally.late_ms.quantile(1.0) or 0.0) > 1.0


def test_more_attention_workers_serve_more_prompts() -> None:
    """Prompts are bound by attention: two workers take the prompts in about half the time."""
    arrivals = poisson(40, float("inf"), 200, 1, 0)
    one, two = make_simulation(1), make_simulation(2)
    run(one, arrivals)
    run(two, arrivals)
    assert two.shares.num_steps == -(-one.shares.num_steps // 2) == 63


@pytest.mark.parametrize("num_prefill_experts", [0, 1])
def test_every_token_of_step_groups_comes_once(num_prefill_experts: int) -> None:
    draw = random.Random(num_prefill_experts)
    arrivals = [Arrival(0.02 * i, draw.randint(1, 150), draw.randint(1, 40)) for i in range(60)]
    simulation = with_groups(num_prefill_experts)
    tally = run(simulation, arrivals)
    assert tally.successful == 60
    assert tally.output_tokens == sum(a.output_len for a in arrivals)
    again = with_groups(num_prefill_experts)
    assert run(again, arrivals).times_ms["itl"].summary() == tally.times_ms["itl"].summary()


def test_a_request_alone_takes_the_steps_of_both_groups() -> None:
    """Two chunks of the prompt, then four decode steps, of which one is the hand-over."""
    simulation = with_groups()
    tally = run(simulation, [Arrival(0.0, 100, 5)])
    assert simulation.shares.num_steps == 2 + 4
    assert simulation.shares.num_rows == 104, "the prompt is not computed again"
    assert simulation.now_s == pytest.approx(simulation.shares.busy_s)
    gaps = tally.times_ms["itl"]
    assert (gaps.quantile(1.0) or 0) <= 1.5 * (gaps.quantile(0.0) or 0)


def test_long_prompts_lengthen_only_steps_of_one_group() -> None:
    """8 streams decode while long prompts arrive: p99 of the time between tokens, by that
    without prompts."""
    streams = [Arrival(0.0, 8, 400) for _ in range(7)]
    prompts = [Arrival(2.0 + i, 600, 1) for i in range(12)]
    slow = []
    for make in (partial(make_simulation, 2), with_groups, partial(with_groups, 1)):
        own = partial(make, device=SLOW_PRODUCTS)
        alone = run(own(), streams).times_ms["itl"].quantile(0.99) or 0.0
        beside = run(own(), [*streams, *prompts]).times_ms["itl"].quantile(0.99) or 0.0
        slow.append(beside / alone)
    one, shared, apart = slow
    assert one > 2
    assert one > shared > apart
    assert apart <= 1.15


def test_decodes_that_share_experts_slow_prompts() -> None:
    streams = [Arrival(0.0, 8, 400) for _ in range(8)]
    prompts = [Arrival(3.0, 600, 1)]
    ends = []
    for arrivals in (prompts, [*streams, *prompts]):
        simulation, tally = with_groups(), Tally({})
        simulation.run(arrivals, tally, lambda: None)
        ends.append(tally.times_ms["ttft"].quantile(1.0) or 0.0)
    assert ends[1] > 1.05 * ends[0]
