"""Characteristics of CPUs and networks for ``cluster.sizing.roofline``, with their sources.

GPUs are in ``cluster.sizing.gpus``.
"""

from __future__ import annotations

from dataclasses import replace

from cluster.config.cluster import ClusterConfig
from cluster.config.resources import WorkerShare
from cluster.sizing.gpus import UNKNOWN_GPU
from cluster.sizing.replay import ExpertStepCost
from cluster.sizing.roofline import DeviceSpec, HostTime

CPU_CORE = DeviceSpec(
    name="CPU core",
    bandwidth_bytes_s=11e9,
    flops_s=1e11,
    link_bytes_s=6e9,
    latency_s=50e-6,
    message_s=50e-6,
    host=HostTime(step_s=400e-6, row_s=23e-6),
)
"""Characteristics of one core of a server. Measured on an AMD EPYC with torch 2.13, one thread:
expert products with few rows read bfloat16 weights at 11 GB/s (29 GB/s is the maximum, with large
matrices that oneDNN prepacked); a product of 256 x 2048 x 2048 runs at 98 GFLOPS in float32 and 155
in bfloat16; loopback TCP transfers 6 GB/s in large frames, and a small frame from one Python
process to another costs about 50 us at each end and as much between. A step outside the model takes
0.59 ms of one thread with 8 greedy requests and 6.4 ms with 256, most of it for sampling from 50304
logits (``python -m benchmarks.engine.step_cost``).
"""
NETWORK_LATENCY_S = 100e-6
"""Latency between two hosts in seconds, through the kernel's TCP."""
CPU_NETWORK_BYTES_S = 1.25e9
"""Network rate of a host without GPUs, in bytes per second (10 Gbit/s Ethernet)."""
GPU_NETWORK_BYTES_S = 50e9
"""Network rate of each GPU, in bytes per second (one 400 Gbit/s adapter for each GPU)."""
_DECODE_ROWS = 16
"""Number of rows in a decode step if the load does not specify it."""


def worker_device(share: WorkerShare, num_nodes: int, gpu: DeviceSpec = UNKNOWN_GPU) -> DeviceSpec:
    """Return characteristics of a worker with ``share`` of a device.

    With several nodes, the network connects the workers. ``gpu``: GPU of workers on CUDA.
    """
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


def expert_step_cost(
    config: ClusterConfig,
    expert_bytes: int,
    dtype: str,
    gpu: DeviceSpec = UNKNOWN_GPU,
) -> ExpertStepCost:
    """Return the cost of an expert step according to the device's roofline.

    Each activated slot costs reading its weights, each (row, expert) pair two operations per
    weight. ``rebalance.slot_cost_pairs`` replaces the time of a slot. The rebalancing policy uses
    only ratios, so a share of a device counts as a whole device.

    ``expert_bytes``: bytes of the largest expert; ``dtype``: dtype of weights, as workers name it;
    ``gpu``: the GPU of workers on CUDA.
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
