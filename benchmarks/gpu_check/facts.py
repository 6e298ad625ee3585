"""What is installed, what the device is, and whether torch has the private functions we use."""

from __future__ import annotations

import importlib.metadata
import inspect
import platform
import sys
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu_check.section import Place, Report
from workers.model import torch_private

_PACKAGES = ("torch", "triton", "numpy", "msgspec", "safetensors", "flashinfer-python", "ray")
_GROUP = ("_start_coalescing", "_end_coalescing", "abort", "send", "recv", "allreduce")
_GROUP_MORE = ("eager_connect_single_device", "comm_split_count", "_get_backend_name")
_OPTIONS = ("_timeout",)
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
    report.value("packages", {name: _version(name) for name in _PACKAGES})
    report.value("cuda", torch.version.cuda)
    report.value("oneDNN", torch._C._has_mkldnn)
    with report.part("torch_private"):
        for name in torch_private.__all__:
            report.check(hasattr(torch_private, name), f"torch_private has no {name}")
    if place.is_gpu:
        with report.part("device"):
            _device(place, report)
    with report.part("process groups"):
        _groups(place, report)
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


def _groups(place: Place, report: Report) -> None:
    """Signatures of what ``workers/model/torch_private.py`` calls, as torch documents them."""
    kind = "ProcessGroupNCCL" if place.is_gpu else "ProcessGroupGloo"
    group: Any = getattr(dist, kind)
    report.check(group is not None, f"torch has no {kind}")
    found = {name: signature_of(group, name) for name in (*_GROUP, *_GROUP_MORE)}
    report.value("signatures", found | {"__init__": signature_of(group, "__init__")})
    for name in _GROUP:
        report.check(bool(found[name]), f"{kind} has no {name}")
    if place.is_gpu:
        options = group.Options()
        for name in _OPTIONS:
            report.check(hasattr(options, name), f"{kind}.Options has no {name}")
        config = getattr(options, "config", None)
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
