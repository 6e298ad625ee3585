"""GPU characteristics by model name, from data sheets; the GPU itself reports its bandwidth.

Sources are NVIDIA's data sheets of the products. Rates of bfloat16 products are without sparsity,
half of what most sheets print. A link is one direction: half of NVLink's rate, or of PCIe's if a
GPU has no NVLink. How much of the bandwidth kernels use, and what their start costs, is measured on
an H100 only.

Costs of messages have not been measured with expertmesh, which needs several GPUs. A message is an
NCCL kernel within a CUDA graph: ``message_s`` is the time of nccl-tests' ``sendrecv_perf`` in a
graph, 3.7 us for 1 KiB over the NVLink of four H800 (github.com/NVIDIA/nccl/issues/1984; about 3 us
between two H100, issues/1487). It is likely too high with many peers, as NCCL runs all messages of
a call in one kernel. ``latency_s`` is an assumption for the waits between NCCL's streams and the
others, and for a network between hosts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from cluster.sizing.roofline import DeviceSpec, HostTime

GPU_HOST = HostTime(step_s=440e-6, row_s=9e-6, expert_s=60e-6)
"""Host time of decode steps that are one CUDA graph for each worker, of greedy requests. Measured
on an AMD EPYC by ``python -m benchmarks.engine.host_cost``, also with ``--batch 256``: a step of an
attention worker takes 0.46 ms of CPU time with 8 rows and 2.6 ms with 256, a step of an expert
worker 0.06 to 0.12 ms, both with 4 and with 48 MoE layers. On the host of an H100, a step of one
worker with all experts took 0.6 ms longer than its kernels with 1 row, and 1.1 ms longer with 64
(docs/results/gpu.md).
"""
H100 = DeviceSpec(
    name="NVIDIA H100",
    bandwidth_bytes_s=3.35e12,
    flops_s=989e12,
    link_bytes_s=450e9,
    latency_s=10e-6,
    message_s=3.7e-6,
    host=GPU_HOST,
    read_share=0.8,
    kernel_s=1.0e-6,
    launch_s=6.3e-6,
    compute_share=0.4,
)
"""H100 SXM: 3.35 TB/s of HBM3, 989 TFLOPS, NVLink of 900 GB/s. Also used for unknown GPUs.

Measured (docs/results/gpu.md): the kernels of experts read 2.7 TB/s with 64 rows; a small kernel
takes 1.0 us in a CUDA graph, and 6.3 us if the host launches it. OLMoE-1B-7B computes prompts at
half of 800 TFLOPS, the rate of a large product.
"""
A100 = replace(
    H100, name="NVIDIA A100", bandwidth_bytes_s=2.039e12, flops_s=312e12, link_bytes_s=300e9
)
"""A100 SXM with 80 GB: 2,039 GB/s of HBM2e, 312 TFLOPS, NVLink of 600 GB/s."""
H200 = replace(H100, name="NVIDIA H200", bandwidth_bytes_s=4.8e12)
"""H200 SXM: HBM3e at 4.8 TB/s, otherwise like an H100."""
_PCIE_4 = 32e9
_KNOWN_GPUS = {
    # a part of the name that CUDA reports; the first match counts
    "A100": A100,
    "H100 NVL": replace(H100, bandwidth_bytes_s=3.9e12, flops_s=835e12, link_bytes_s=300e9),
    "H100 PCIe": replace(H100, bandwidth_bytes_s=2.0e12, flops_s=756e12, link_bytes_s=300e9),
    "H100": H100,
    "H200 NVL": replace(H200, flops_s=835e12),
    "H200": H200,
    "B200": replace(H100, bandwidth_bytes_s=8.0e12, flops_s=2250e12, link_bytes_s=900e9),
    "L40S": replace(H100, bandwidth_bytes_s=864e9, flops_s=362e12, link_bytes_s=_PCIE_4),
    "L4": replace(H100, bandwidth_bytes_s=300e9, flops_s=121e12, link_bytes_s=_PCIE_4),
}
"""GPU characteristics by a part of the GPU's name. B200: a DGX B200 divided by its eight GPUs."""


def _contains(words: list[str], part: list[str]) -> bool:
    """Return whether ``words`` has all of ``part``; ``A100-SXM4-80GB`` also counts as ``A100``."""
    products = {word.partition("-")[0] for word in words} | set(words)
    return products.issuperset(part)


def gpu_spec(name: str, bandwidth_bytes_s: float = 0.0) -> DeviceSpec:
    """Return characteristics of a GPU by the name that CUDA reports (``NVIDIA H100 80GB HBM3``).

    ``bandwidth_bytes_s`` is the memory bandwidth that the GPU reports, 0 if unknown: memory differs
    between the versions of a product. An unknown GPU, or none (an empty name), gets the numbers of
    an H100 and a name that states this.
    """
    words = name.split()
    wanted = (part for part in _KNOWN_GPUS if _contains(words, part.split()))
    part = next(wanted, None)
    if part is None:
        found = replace(H100, name=f"{name or 'GPU'} (numbers of an H100)")
    else:
        found = replace(_KNOWN_GPUS[part], name=name)
    return replace(found, bandwidth_bytes_s=bandwidth_bytes_s or found.bandwidth_bytes_s)


UNKNOWN_GPU = gpu_spec("")
"""Characteristics that are used if the GPU is unknown: numbers of an H100."""


def slowest_gpu(facts: Iterable[tuple[str, float]]) -> DeviceSpec:
    """Return characteristics of the slowest GPU, for which every step waits.

    ``facts``: name and memory bandwidth in bytes per second of each GPU; may be empty.
    """
    gpus = [gpu_spec(*known) for known in facts]
    return min(gpus, key=lambda gpu: gpu.bandwidth_bytes_s, default=UNKNOWN_GPU)
