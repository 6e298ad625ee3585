"""The roofline formulas, against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cluster.config.resources import WorkerShare
from cluster.sizing.devices import CPU_CORE, worker_device
from cluster.sizing.gpus import H100
from cluster.sizing.roofline import (
    BankSize,
    DeviceSpec,
    HostTime,
    ModelSize,
    activated_experts,
    activation_shares,
    attention_step,
    colocated_step,
    disaggregated_step,
    distinct_devices,
    expert_step,
)
from tests.cluster.sizing.models import OLMOE

DEVICE = DeviceSpec(
    name="round numbers",
    bandwidth_bytes_s=1e9,
    flops_s=1e12,
    link_bytes_s=1e8,
    latency_s=0.0,
    message_s=0.0,
)
"""1 ms reads 1 MB and sends 100 kB."""
BANK = BankSize(num_experts=4, top_k=2, expert_values=1_000_000, in_values=1000, out_values=500)
MODEL = ModelSize(
    banks=(BANK, BANK), attention_values=3_000_000, kv_bytes_per_token=2000, itemsize=2
)


def test_experts_touched_by_a_batch() -> None:
    assert activated_experts([0.5] * 4, 2) == 3.0
    assert activated_experts([1.0, 0.0], 5) == 1.0
    assert activated_experts([0.25], 1) == 0.25


def test_a_row_of_olmoe_reaches_5_43_of_8_devices() -> None:
    missed = math.comb(56, 8) / math.comb(64, 8)
    assert distinct_devices(64, 8, 8) == pytest.approx(8 * (1 - missed))
    assert distinct_devices(64, 8, 8) == pytest.approx(5.43, abs=0.01)
    assert distinct_devices(64, 8, 1) == 1.0
    assert distinct_devices(4, 4, 4) == 4.0


def test_an_expert_step_reads_what_is_touched_or_computes() -> None:
    """4 experts of 2 MB, p 0.5: 2 rows touch 3 of them, 6 MB."""

    def step(
        rows: float, devices: int = 1, balancedness: float = 1.0, flops: float = 1e12
    ) -> float:
        return expert_step(
            BANK,
            rows,
            num_devices=devices,
            itemsize=2,
            device=replace(DEVICE, flops_s=flops),
            balancedness=balancedness,
        )

    assert step(2) == pytest.approx(6e-3)
    assert step(2, devices=2) == pytest.approx(3e-3)
    assert step(2, devices=2, balancedness=0.5) == pytest.approx(6e-3)
    assert step(2, flops=1e9) == pytest.approx(8e-3)  # 2 x 2 rows x 2 experts x 1e6 operations
    assert step(3, flops=1e9) == pytest.approx(12e-3)


def test_skewed_experts_are_touched_less() -> None:
    skewed = replace(BANK, activation=(1.0, 1.0, 0.0, 0.0))
    assert activated_experts(skewed.probabilities, 100) == 2.0
    assert activated_experts(BANK.probabilities, 100) == pytest.approx(4.0)


def test_an_attention_step_reads_weights_and_context() -> None:
    # 3e6 weights + 4 rows x 500 tokens x 1000 values, of 2 bytes
    assert attention_step(MODEL, 4, 500, DEVICE) == pytest.approx(10e-3)
    # 4 states of 100,000 bytes are read, and written
    recurrent = replace(MODEL, state_bytes=100_000)
    assert attention_step(recurrent, 4, 500, DEVICE) == pytest.approx(10e-3 + 0.8e-3)


def test_two_pools_with_one_micro_batch_are_the_sum_of_their_parts() -> None:
    """1 row: attention 6 ms, experts 2 x 4 MB over 2 workers 4 ms, the exchange below."""
    step = disaggregated_step(MODEL, 1, 0, num_attention=1, num_experts=2, device=DEVICE)
    # A row reaches 2 x (1 - 1/6) = 5/3 of 2 devices: 2000 bytes there, 2000 home, in 2 banks.
    exchange_s = 2 * 5 / 3 * 4000 / 1e8
    assert step.num_micro_batches == 1
    assert step.attention_s == pytest.approx(6e-3)
    assert step.experts_s == pytest.approx(4e-3)
    assert step.exchange_s == pytest.approx(exchange_s)
    assert step.step_s == pytest.approx(10e-3 + exchange_s)
    assert step.layout == "1 attention + 2 expert workers"


def test_two_micro_batches_overlap_where_the_context_outweighs_the_weights() -> None:
    """64 rows of 1000 tokens: a half reads 6 MB of weights and 64 MB of KV."""
    free = replace(DEVICE, link_bytes_s=1e15)
    step = disaggregated_step(MODEL, 64, 1000, num_attention=1, num_experts=2, device=free)
    assert step.num_micro_batches == 2
    assert step.attention_s == pytest.approx(70e-3)
    assert step.experts_s == pytest.approx(8e-3)
    assert step.step_s == pytest.approx(140e-3)  # one: 134 ms + 8 ms


def test_attention_workers_share_the_context() -> None:
    """4 rows of 500 tokens: one worker of two has 2 of them, or 1 in each micro-batch."""
    free = replace(DEVICE, link_bytes_s=1e15)
    apart = disaggregated_step(MODEL, 4, 500, num_attention=2, num_experts=2, device=free)
    assert apart.num_micro_batches == 2
    assert apart.attention_s == pytest.approx(7e-3)
    together = colocated_step(MODEL, 4, 500, num_workers=2, device=free)
    assert together.num_micro_batches == 1
    assert together.attention_s == pytest.approx(8e-3)


def test_a_slow_link_is_worth_two_micro_batches_and_there_are_no_more() -> None:
    slow = replace(DEVICE, link_bytes_s=1e5)
    step = colocated_step(MODEL, 4, 500, num_workers=2, device=slow)
    assert step.num_micro_batches == 2
    assert step.exchange_s == pytest.approx(2 * (5 / 3) / 2 * 4000 / 1e5)  # of 2 rows


def test_the_narrow_pool_is_where_the_rows_queue() -> None:
    """All rows pass through 1 attention worker, or through each half of 2."""

    def exchange(num_attention: int) -> float:
        return disaggregated_step(
            MODEL, 1, 0, num_attention=num_attention, num_experts=2, device=DEVICE
        ).exchange_s

    assert exchange(1) == pytest.approx(2 * exchange(2))


def test_colocated_workers_keep_their_own_rows_and_share_all_work() -> None:
    """2 workers, 2 rows: attention of 1 row each, 3 of 4 experts touched over 2 devices."""
    step = colocated_step(MODEL, 2, 0, num_workers=2, device=DEVICE)
    assert step.attention_s == pytest.approx(6e-3)
    assert step.experts_s == pytest.approx(2 * 3e-3)
    assert step.exchange_s == pytest.approx(2 * (5 / 3) / 2 * 4000 / 1e8)
    assert step.step_s == pytest.approx(12e-3 + step.exchange_s)


def test_a_single_colocated_worker_sends_nothing() -> None:
    device = replace(DEVICE, latency_s=1.0, message_s=1.0)
    assert colocated_step(MODEL, 1, 0, num_workers=1, device=device).exchange_s == 0.0


def test_latencies_count_for_every_exchange() -> None:
    slow = replace(DEVICE, link_bytes_s=1e15, latency_s=1e-3)
    step = disaggregated_step(MODEL, 1, 0, num_attention=1, num_experts=1, device=slow)
    assert step.exchange_s == pytest.approx(4e-3)  # 2 banks, there and back
    chatty = replace(DEVICE, link_bytes_s=1e15, message_s=1e-3)
    apart = disaggregated_step(MODEL, 1, 0, num_attention=2, num_experts=6, device=chatty)
    together = colocated_step(MODEL, 1, 0, num_workers=8, device=chatty)
    # 2 banks: a home sends to and hears from 6, an expert worker from 2; or everyone 7, twice.
    assert apart.attention_s == pytest.approx(6e-3 + 24e-3)
    assert apart.experts_s == pytest.approx(8e-3 / 6 + 8e-3)
    assert together.attention_s == pytest.approx(6e-3 + 28e-3)
    assert together.experts_s == pytest.approx(1e-3 + 28e-3)


HOST = HostTime(step_s=1e-3, row_s=1e-4, expert_s=5e-4)


def test_the_host_of_an_attention_worker_is_added_once_to_a_step() -> None:
    """64 rows on 2 attention workers: 1 ms and 32 x 0.1 ms, for one or two micro-batches."""
    busy = replace(DEVICE, link_bytes_s=1e15, host=HOST)
    for context in (0, 1000):
        with_host, without = (
            disaggregated_step(MODEL, 64, context, num_attention=2, num_experts=2, device=device)
            for device in (busy, replace(busy, host=HostTime()))
        )
        assert with_host.num_micro_batches == without.num_micro_batches
        assert with_host.host_s == pytest.approx(4.2e-3)
        assert with_host.step_s == pytest.approx(without.step_s + 4.2e-3)


def test_the_host_of_an_expert_worker_works_meanwhile() -> None:
    device = replace(DEVICE, host=replace(HOST, expert_s=2e-3))
    step = disaggregated_step(MODEL, 1, 0, num_attention=1, num_experts=2, device=device)
    assert step.host_s == pytest.approx(2e-3)  # longer than 1 ms and 0.1 ms
    step = disaggregated_step(MODEL, 20, 0, num_attention=1, num_experts=2, device=device)
    assert step.host_s == pytest.approx(3e-3)


def test_the_host_of_a_colocated_worker_does_both() -> None:
    device = replace(DEVICE, host=HOST)
    assert colocated_step(MODEL, 20, 0, num_workers=2, device=device).host_s == pytest.approx(
        1e-3 + 10 * 1e-4 + 5e-4
    )
    alone = colocated_step(MODEL, 20, 0, num_workers=1, device=device)
    assert alone.host_s == pytest.approx(1e-3 + 20 * 1e-4)
    assert alone.step_s == pytest.approx(alone.attention_s + alone.experts_s + alone.host_s)


@pytest.mark.parametrize("batch", [1, 8, 64, 256])
@pytest.mark.parametrize("device", [CPU_CORE, H100], ids=lambda device: device.name)
def test_no_step_is_shorter_than_the_host_needs(device: DeviceSpec, batch: int) -> None:
    tiny = replace(MODEL, banks=(replace(BANK, expert_values=1),), attention_values=1)
    apart = disaggregated_step(tiny, batch, 0, num_attention=1, num_experts=2, device=device)
    together = colocated_step(tiny, batch, 0, num_workers=3, device=device)
    assert apart.step_s > apart.host_s == device.host.attention_s(batch) > 0.4e-3
    assert together.step_s > together.host_s >= device.host.attention_s(batch / 3) > 0.4e-3


def test_kernels_read_at_a_share_of_the_bandwidth() -> None:
    slow = replace(DEVICE, read_share=0.5)
    assert attention_step(MODEL, 4, 500, slow) == pytest.approx(20e-3)
    step = disaggregated_step(MODEL, 1, 0, num_attention=1, num_experts=2, device=slow)
    assert step.attention_s == pytest.approx(12e-3)
    assert step.experts_s == pytest.approx(8e-3)


def test_each_kernel_of_a_layer_takes_time_to_start() -> None:
    """2 banks with 12 and 4 kernels: in a graph 1 us each, else 10 us, as for each message."""
    device = replace(DEVICE, kernel_s=1e-6, launch_s=10e-6, link_bytes_s=1e15)
    for model, start_s, message_s in (
        (MODEL, 1e-6, 0.0),
        (replace(MODEL, is_captured=False), 10e-6, 10e-6),
    ):
        step = disaggregated_step(model, 1, 0, num_attention=1, num_experts=2, device=device)
        # 2 exchanges, to and from 2 expert workers, or 1 attention worker
        assert step.attention_s == pytest.approx(6e-3 + 24 * start_s + 8 * message_s)
        assert step.experts_s == pytest.approx(4e-3 + 8 * start_s + 4 * message_s)


def test_an_h100_is_predicted_as_it_was_measured() -> None:
    """OLMoE-1B-7B in one process with context 1,024 (docs/results/gpu.md): within 15%."""
    for batch, tokens_per_s in ((1, 528), (64, 6602), (256, 12833)):
        step = colocated_step(OLMOE, batch, 1024, num_workers=1, device=H100)
        assert step.step_s == pytest.approx(batch / tokens_per_s, rel=0.15)


def test_expert_load_becomes_probabilities() -> None:
    assert activation_shares((30, 10, 0, 0), 1) == (0.75, 0.25, 0.0, 0.0)
    assert activation_shares((30, 10, 0, 0), 2) == (1.0, 0.5, 0.0, 0.0)
    assert activation_shares((0.5, 0.5), 1) == (0.5, 0.5)
    assert activation_shares((0, 0), 1) == activation_shares((), 1) == ()


def test_a_worker_has_its_share_and_the_network_between_hosts() -> None:
    half = worker_device(WorkerShare(cpus=0.5, gpus=0.0, device="cpu"), num_nodes=1)
    assert half.bandwidth_bytes_s == CPU_CORE.bandwidth_bytes_s / 2
    assert half.link_bytes_s == CPU_CORE.link_bytes_s
    far = worker_device(WorkerShare(cpus=4.0, gpus=0.0, device="cpu"), num_nodes=2)
    assert far.link_bytes_s < CPU_CORE.link_bytes_s
    assert far.latency_s > CPU_CORE.latency_s
    gpu = worker_device(WorkerShare(cpus=1.0, gpus=0.25, device="cuda"), num_nodes=1)
    assert gpu.flops_s == H100.flops_s / 4
