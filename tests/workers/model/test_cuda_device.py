"""What a GPU says of itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from workers.model.cuda_device import gpu_facts

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
