"""What is installed, what the device is, and whether torch has the functions that we call."""

from __future__ import annotations

import importlib.metadata
import inspect
import platform
import sys
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_check.section import Place, Report
from benchmarks.gpu_check.torch_needs import has_cuda_build, problems
from workers.model.torch_private import check_version

_PACKAGES = (
    *("torch", "triton", "numpy", "msgspec", "safetensors", "llguidance"),
    *("nvidia-ml-py", "flashinfer-python", "transformers", "ray"),
)
_SHOWN = ("__init__", "send", "recv", "abort", "_start_coalescing", "_end_coalescing")
_SHOWN_MORE = ("eager_connect_single_device", "comm_split_count", "_get_backend_name")
_CUDA_FACTS = (
    "name",
    "major",
    "minor",
    "total_memory",
    "multi_processor_count",
    "L2_cache_size",
    "shared_memory_per_multiprocessor",
    "regs_per_multiprocessor",
    "warp_size",
)


def run(place: Place, report: Report) -> None:
    """All facts; what our own code needs of torch is a check."""
    report.value("python", sys.version)
    report.value("machine", f"{platform.platform()} {platform.machine()}")
    packages = {name: _version(name) for name in _PACKAGES}
    report.value("packages", {**packages, "torch": torch.__version__})  # with its build
    report.value("cuda", torch.version.cuda)
    report.value("oneDNN", torch._C._has_mkldnn)
    with report.part("torch"):
        check_version(torch.__version__)
        for problem in problems():
            report.check(False, problem)
        report.value("names of CUDA builds", "checked" if has_cuda_build() else "not in this build")
    if place.is_gpu:
        with report.part("device"):
            _device(place, report)
    with report.part("process groups"):
        _groups(report)
    name = torch.cuda.get_device_name(place.device) if place.is_gpu else platform.machine()
    report.say(f"torch {torch.__version__}, {name}")


def _device(place: Place, report: Report) -> None:
    properties: Any = torch.cuda.get_device_properties(place.device)
    known = {name: getattr(properties, name, None) for name in _CUDA_FACTS}
    report.value("device", known)
    report.value("free_bytes", torch.cuda.mem_get_info(place.device)[0])
    report.value("nccl", torch.cuda.nccl.version())  # type: ignore[no-untyped-call]
    report.value("cudnn", torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    report.value("arch_list", torch.cuda.get_arch_list())
    capability = torch.cuda.get_device_capability(place.device)
    report.check(capability >= (8, 0), f"compute capability {capability} is below 8.0")
    report.check(find_spec("triton") is not None, "triton is not installed")


def _groups(report: Report) -> None:
    """What torch says of the process groups of this build, for people to read."""
    kind = "ProcessGroupNCCL" if has_cuda_build() else "ProcessGroupGloo"
    group: Any = getattr(dist, kind, None)
    names = (*_SHOWN, *_SHOWN_MORE)
    report.value("signatures", {name: signature_of(group, name) for name in names})
    if has_cuda_build():
        config = group.Options().config
        report.value("nccl_config", [name for name in dir(config) if name[0] != "_"])


def signature_of(owner: Any, name: str) -> str:
    """A function's own words about its arguments; empty where there is no such function."""
    function = getattr(owner, name, None)
    if function is None:
        return ""
    text = inspect.getdoc(function) or ""
    lines = [line.strip() for line in text.splitlines() if "->" in line]
    return " | ".join(lines) or "present"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
