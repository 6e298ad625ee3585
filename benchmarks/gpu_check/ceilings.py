"""Peak rates of the device, with which the other numbers are compared."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu_check.device import captured, host_seconds_of, seconds_of
from benchmarks.gpu_check.section import Place, Report

_GIB = 1 << 30
_GRAPH_KERNELS = 1000
_SMALL = 1024
"""Elements of a tensor whose kernel takes no longer than its launch."""


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes a second of a copy within the device, reads and writes counted together."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_of(device, lambda: target.copy_(source))


def read_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes a second of reading alone: the faster of a sum and a maximum."""
    numbers = torch.ones(num_bytes // 4, device=device)
    calls = (lambda: numbers.sum(), lambda: numbers.amax())
    return num_bytes / min(seconds_of(device, call) for call in calls)


def matrix_rate(device: torch.device, width: int) -> float:
    """Floating-point operations a second of a product of square matrices in bfloat16."""
    x = torch.randn(width, width, device=device).to(torch.bfloat16)
    y, out = x.T.contiguous().T, torch.empty_like(x)
    return 2.0 * width**3 / seconds_of(device, lambda: torch.mm(x, y, out=out))


def run(place: Place, report: Report) -> None:
    """Measure all peak rates."""
    device = place.device
    num_bytes = place.size(4 * _GIB, 1 << 20)
    if place.is_gpu:
        num_bytes = min(num_bytes, torch.cuda.mem_get_info(device)[0] // 4)
    found = {
        "read_bytes_per_s": read_bandwidth(device, num_bytes),
        "copy_bytes_per_s": copy_bandwidth(device, num_bytes),
        "bf16_flops": matrix_rate(device, place.size(8192, 64)),
    }
    for name, value in found.items():
        report.value(name, value)
    with report.part("launches"):
        _launches(place, report)
    if place.is_gpu:
        with report.part("graphs"):
            _graphs(place, report)
    report.say(
        f"read {found['read_bytes_per_s'] / 1e9:.0f} GB/s, "
        f"copy {found['copy_bytes_per_s'] / 1e9:.0f} GB/s, {found['bf16_flops'] / 1e12:.0f} TFLOPS"
    )


def _launches(place: Place, report: Report) -> None:
    """Time of a small kernel, and of a wait for it."""
    device = place.device
    x = torch.ones(_SMALL, device=device)
    host = torch.ones(_SMALL, pin_memory=place.is_gpu)
    calls = place.size(1000, 10)
    report.value("launch_s", seconds_of(device, lambda: x.add_(1.0), calls=calls))
    report.value("launch_host_s", host_seconds_of(device, lambda: x.add_(1.0)))
    report.value("wait_s", host_seconds_of(device, lambda: x.add_(1.0)[0].item()))
    report.value("copy_in_s", host_seconds_of(device, lambda: x.copy_(host, non_blocking=True)))
    report.value("copy_home_s", host_seconds_of(device, lambda: host.copy_(x)))


def _graphs(place: Place, report: Report) -> None:
    """Time of a CUDA graph's replay for each of its small kernels, and once for the host."""
    x = torch.ones(_SMALL, device=place.device)

    def call() -> Tensor:
        for _ in range(_GRAPH_KERNELS):
            x.add_(1.0)
        return x

    graph, _ = captured(place.device, call)
    took = seconds_of(place.device, graph.replay)
    report.value("graph_kernel_s", took / _GRAPH_KERNELS)
    report.value("graph_replay_host_s", host_seconds_of(place.device, graph.replay))
