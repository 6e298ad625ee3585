"""Numbers of GPUs by the names that CUDA gives them."""

from __future__ import annotations

import pytest

from cluster.sizing.gpus import A100, H100, H200, UNKNOWN_GPU, gpu_spec, slowest_gpu


@pytest.mark.parametrize(
    ("name", "bandwidth", "tflops", "link"),
    [
        ("NVIDIA A100-SXM4-80GB", 2.039e12, 312, 300e9),
        ("NVIDIA A100 80GB PCIe", 2.039e12, 312, 300e9),
        ("NVIDIA H100 80GB HBM3", 3.35e12, 989, 450e9),
        ("NVIDIA H100 NVL", 3.9e12, 835, 300e9),
        ("NVIDIA H100 PCIe", 2.0e12, 756, 300e9),
        ("NVIDIA H200", 4.8e12, 989, 450e9),
        ("NVIDIA B200", 8.0e12, 2250, 900e9),
        ("NVIDIA L40S", 864e9, 362, 32e9),
        ("NVIDIA L4", 300e9, 121, 32e9),
        ("H200", 4.8e12, 989, 450e9),
    ],
)
def test_known_gpus_have_numbers_of_their_own(
    name: str, bandwidth: float, tflops: float, link: float
) -> None:
    found = gpu_spec(name)
    assert found.name == name
    assert (found.bandwidth_bytes_s, found.flops_s, found.link_bytes_s) == (
        bandwidth,
        tflops * 1e12,
        link,
    )


def test_the_bandwidth_that_a_gpu_names_comes_first() -> None:
    found = gpu_spec("NVIDIA A100-SXM4-40GB", 1.555e12)
    assert (found.bandwidth_bytes_s, found.flops_s) == (1.555e12, A100.flops_s)


@pytest.mark.parametrize("name", ["NVIDIA X1", "NVIDIA L40", "NVIDIA GeForce RTX 4090", "NVIDIA"])
def test_unknown_gpus_have_the_numbers_of_an_h100_and_say_so(name: str) -> None:
    found = gpu_spec(name)
    assert found.name == f"{name} (numbers of an H100)"
    assert found.flops_s == H100.flops_s
    assert gpu_spec(name, 1e12).bandwidth_bytes_s == 1e12


def test_all_gpus_have_the_costs_of_messages_and_of_the_host() -> None:
    for name in ("A100", "H200 NVL", "L4", "unknown"):
        found = gpu_spec(name)
        assert (found.message_s, found.latency_s) == (3.7e-6, 10e-6)
        assert found.host == H100.host
        assert found.host.attention_s(256) == pytest.approx(2.74e-3, rel=0.01)


def test_no_gpu_is_an_unknown_one() -> None:
    assert gpu_spec("").name == "GPU (numbers of an H100)"
    assert gpu_spec("").bandwidth_bytes_s == H100.bandwidth_bytes_s < H200.bandwidth_bytes_s


def test_a_step_is_as_slow_as_the_slowest_gpu() -> None:
    assert slowest_gpu([("NVIDIA H200", 0.0), ("NVIDIA H100", 0.0)]).name == "NVIDIA H100"
    assert slowest_gpu([("NVIDIA H200", 1e12), ("NVIDIA H100", 0.0)]).name == "NVIDIA H200"
    assert slowest_gpu([]) == UNKNOWN_GPU
