"""Numbers of devices and links for ``cluster.sizing.roofline``, with where they come from.

Those of GPUs are in ``cluster.sizing.gpus``.
"""

from __future__ import annotations

from dataclasses import replace

from cluster.config.cluster import ClusterConfig
from cluster.config.resources import WorkerShare
from cluster.sizing.gpus import UNKNOWN_GPU
from cluster.sizing.replay import ExpertStepCost
from cluster.sizing.roofline import DeviceNumbers

CPU_CORE = DeviceNumbers(
    name="CPU core",
    bandwidth_bytes_s=11e9,
    flops_s=1e11,
    link_bytes_s=6e9,
    latency_s=50e-6,
    message_s=50e-6,
)
"""One core of a server. Measured on an AMD EPYC with torch 2.13, one thread: bfloat16 weights are
read at 11 GB/s by products with few rows of an expert (29 GB/s is the most, with large matrices
that oneDNN prepacked); a product of 256 x 2048 x 2048 runs at 98 GFLOPS in float32 and 155 in
bfloat16; loopback TCP moves 6 GB/s in large frames, and a small frame from one Python process to
another costs some 50 us on each end and as much between."""
NETWORK_LATENCY_S = 100e-6
"""From host to host, through the kernel's TCP."""
CPU_NETWORK_BYTES_S = 1.25e9
"""10 GbE: what hosts without GPUs commonly have."""
GPU_NETWORK_BYTES_S = 50e9
"""One 400 Gbit/s adapter for each GPU."""
_DECODE_ROWS = 16
"""Rows of a decode step, where the load does not say."""


def worker_numbers(
    share: WorkerShare, num_nodes: int, gpu: DeviceNumbers = UNKNOWN_GPU
) -> DeviceNumbers:
    """What one worker with that share can do; between several nodes the network is the link."""
    on_gpu = share.device == "cuda"
    device = gpu if on_gpu else CPU_CORE
    device = device.share(share.gpus if on_gpu else share.cpus or 1.0)
    if num_nodes == 1:
        return device
    return replace(
        device,
        link_bytes_s=GPU_NETWORK_BYTES_S if on_gpu else CPU_NETWORK_BYTES_S,
        latency_s=device.latency_s + (0.0 if on_gpu else NETWORK_LATENCY_S),
    )


def step_cost(
    config: ClusterConfig,
    expert_bytes: int,
    dtype: str,
    gpu: DeviceNumbers = UNKNOWN_GPU,
) -> ExpertStepCost:
    """By the roofline of the device: a slot's weights are read, each pair is two
    operations a weight. ``rebalance.slot_cost_pairs`` replaces the time of a slot. The policy uses
    ratios only, so that a part of a device counts as a whole one.

    ``expert_bytes``: of the largest expert; ``dtype``: as workers name it; ``gpu``: of workers on
    CUDA.
    """
    device = gpu if config.workers.device == "cuda" else CPU_CORE
    weights = expert_bytes / (4 if dtype == "float32" else 2)
    token_s = 2.0 * weights / device.flops_s
    slot_s = expert_bytes / device.bandwidth_bytes_s
    if config.rebalance.slot_cost_pairs is not None:
        slot_s = config.rebalance.slot_cost_pairs * token_s
    return ExpertStepCost(
        slot_s=slot_s, token_s=token_s, expert_bytes=expert_bytes, decode_tokens=_DECODE_ROWS
    )
