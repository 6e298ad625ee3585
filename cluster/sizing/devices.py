"""Numbers of devices and links for ``cluster.sizing.roofline``, with where they come from."""

from __future__ import annotations

from dataclasses import replace

from cluster.config.resources import WorkerShare
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
GPU = DeviceNumbers(
    name="GPU",
    bandwidth_bytes_s=3.35e12,
    flops_s=989e12,
    link_bytes_s=450e9,
    latency_s=10e-6,
    message_s=2e-6,
)
"""NVIDIA H100 SXM, from its data sheet: 3.35 TB/s of HBM3, 989 TFLOPS of dense bfloat16, NVLink of
900 GB/s in both directions together. Latencies are typical of grouped NCCL sends on one host."""
NETWORK_LATENCY_S = 100e-6
"""From host to host, through the kernel's TCP."""
CPU_NETWORK_BYTES_S = 1.25e9
"""10 GbE: what hosts without GPUs commonly have."""
GPU_NETWORK_BYTES_S = 50e9
"""One 400 Gbit/s adapter for each GPU."""


def worker_numbers(share: WorkerShare, num_nodes: int) -> DeviceNumbers:
    """What one worker with that share can do; between several nodes the network is the link."""
    on_gpu = share.device == "cuda"
    device = GPU if on_gpu else CPU_CORE
    device = device.share(share.gpus if on_gpu else share.cpus or 1.0)
    if num_nodes == 1:
        return device
    return replace(
        device,
        link_bytes_s=GPU_NETWORK_BYTES_S if on_gpu else CPU_NETWORK_BYTES_S,
        latency_s=device.latency_s + (0.0 if on_gpu else NETWORK_LATENCY_S),
    )
