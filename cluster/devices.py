"""Numbers of devices and links for ``cluster.sizing``, with where they come from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.resources import WorkerShare
from cluster.sizing import DeviceNumbers

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


GPUS_PER_NODE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeKind:
    """A server of 8 GPUs."""

    name: str
    """For people."""
    gpu: DeviceNumbers
    """Each of them, with its link to the others."""
    memory_bytes: float
    """Of each."""
    network_bytes_s: float
    """To other nodes, for each GPU, one direction, bytes a second."""

    def worker(self, num_nodes: int) -> DeviceNumbers:
        """What a worker with one of the GPUs can do, among workers on so many nodes."""
        return self.gpu if num_nodes == 1 else replace(self.gpu, link_bytes_s=self.network_bytes_s)


A100_NODE = NodeKind(
    name="A100-80GB",
    gpu=replace(GPU, name="A100", bandwidth_bytes_s=2.039e12, flops_s=312e12, link_bytes_s=300e9),
    memory_bytes=80e9,
    network_bytes_s=25e9,
)
"""NVIDIA A100 SXM 80 GB, from its data sheet: 2,039 GB/s of HBM2e, 312 TFLOPS of dense bfloat16,
NVLink of 600 GB/s in both directions together; one 200 Gbit/s adapter for each GPU."""
H100_NODE = NodeKind(
    name="H100-80GB",
    gpu=replace(GPU, name="H100"),
    memory_bytes=80e9,
    network_bytes_s=GPU_NETWORK_BYTES_S,
)
"""See ``GPU``."""
H200_NODE = NodeKind(
    name="H200-141GB",
    gpu=replace(GPU, name="H200", bandwidth_bytes_s=4.8e12),
    memory_bytes=141e9,
    network_bytes_s=GPU_NETWORK_BYTES_S,
)
"""NVIDIA H200 SXM, from its data sheet: 141 GB of HBM3e at 4.8 TB/s, otherwise an H100."""


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
