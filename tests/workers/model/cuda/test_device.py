"""What a GPU says of itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from workers.model.cuda import device as cuda_device
from workers.model.cuda.device import gpu_facts, gpu_stats

GPU = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("extra", "bandwidth"),
    [({"memory_clock_rate": 2_619_000, "memory_bus_width": 5120}, 3.352e12), ({}, 0.0)],
)
def test_bandwidth_follows_from_clock_and_bus(
    extra: dict[str, int], bandwidth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def properties(device: torch.device) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(name="NVIDIA H100 80GB HBM3", **extra)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    name, found = gpu_facts(GPU)
    assert name == "NVIDIA H100 80GB HBM3"
    assert found == pytest.approx(bandwidth, rel=1e-3)
    assert asked == [GPU]


@pytest.mark.parametrize("has_nvml", [False, True])
def test_memory_is_measured_and_use_where_the_driver_can_be_asked(
    has_nvml: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_device, "_HAS_NVML", has_nvml)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 80))
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 45)
    memory = {"gpu_memory_used_bytes": 50.0, "gpu_memory_total_bytes": 80.0}
    assert gpu_stats(GPU) == memory | ({"gpu_utilization_perc": 0.45} if has_nvml else {})
    assert gpu_stats(torch.device("cpu")) == {}


def test_a_gpu_without_a_measure_of_its_use_has_no_such_gauge(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class NotSupportedError(Exception):
        """As ``pynvml.NVMLError_NotSupported``."""

    def refuse(device: torch.device) -> int:
        raise NotSupportedError

    monkeypatch.setattr(cuda_device, "_HAS_NVML", True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 80))
    monkeypatch.setattr(torch.cuda, "utilization", refuse)
    assert gpu_stats(GPU).keys() == {"gpu_memory_used_bytes", "gpu_memory_total_bytes"}
