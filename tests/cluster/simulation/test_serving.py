"""``ServingSimulation``: a workload in virtual time."""

from __future__ import annotations

import random

import pytest

from cluster.config.cluster import EngineSection
from cluster.simulation.serving import ServingSimulation
from cluster.sizing.mixed_step import PoolSizes, StepTimes
from cluster.workload.arrivals import Arrival, poisson
from cluster.workload.tally import Tally
from tests.cluster.sizing.test_mixed_step import DEVICE, MODEL
from workers.engine.micro_batches import MicroBatchRule


def make_simulation(
    num_attention: int = 1, num_kv_blocks: int = 1000, **more: float
) -> ServingSimulation:
    pools = PoolSizes(num_attention=num_attention, num_experts=2)
    return ServingSimulation(
        StepTimes(MODEL, pools, DEVICE),
        EngineSection(max_num_seqs=8, max_num_batched_tokens=64),
        num_attention=num_attention,
        num_kv_blocks=num_kv_blocks,
        max_model_len=1024,
        micro_batches=MicroBatchRule(),
        **more,  # type: ignore[arg-type]
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
