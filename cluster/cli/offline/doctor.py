"""``doctor``: does this host have what serving needs?"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from cluster.cli.offline.version import versions
from cluster.cli.terminal.arguments import Commands
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.cli.terminal.output import colour, note, show
from cluster.config.cluster import WorkersSection
from cluster.config.resources import NodeResources, plan_shares
from cluster.core.errors import CheckpointError, ConfigError, StartError
from cluster.launch import state_file
from cluster.launch.local_ray import OBJECT_STORE_BYTES, make_temp_dir
from cluster.launch.model_source import bundled_checkpoint
from cluster.launch.plan import check_ports, count_cpus, count_gpus

Verdict = Literal["ok", "warn", "bad"]
MIN_MEMORY_BYTES = 3 << 30
DEFAULT_PORTS = {"port": 8000, "grpc_port": 50051}
_TORCH_PROBE = """
import torch
print(torch.cuda.is_available(), torch.version.cuda, torch.cuda.nccl.version())
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One line of the examination."""

    what: str
    """What was looked at."""
    verdict: Verdict
    """``bad``: ``serve`` would not work."""
    text: str
    """What was found, and what helps."""


def add_commands(commands: Commands) -> None:
    commands.add("doctor", run, "examine this host")


def run(args: argparse.Namespace) -> int:
    """Print all findings; ``FAILED`` when one is bad."""
    findings = [examine() for examine in EXAMINATIONS]
    is_fine = all(f.verdict != "bad" for f in findings)
    document = {"schema": 1, "ok": is_fine, "findings": [asdict(f) for f in findings]}
    show(args, document, "\n".join(_line(f, not args.no_color) for f in findings))
    return ExitCode.OK if is_fine else ExitCode.FAILED


def _line(finding: Finding, colours: bool) -> str:
    name = {"ok": "green", "warn": "yellow", "bad": "red"}[finding.verdict]
    mark = colour(finding.verdict.ljust(4), name, colours)
    return f"{mark} {finding.what.ljust(12)} {finding.text}"


def _finding(what: str, is_ok: bool, text: str, otherwise: Verdict = "bad") -> Finding:
    return Finding(what=what, verdict="ok" if is_ok else otherwise, text=text)


def examine_python() -> Finding:
    text = f"{sys.version.split()[0]} at {sys.executable}"
    return _finding("python", sys.version_info >= (3, 11), text)


def examine_packages() -> Finding:
    found = versions()
    missing = [name for name, number in found.items() if number is None]
    text = ", ".join(f"{name} {number or 'missing'}" for name, number in found.items())
    return _finding("packages", not missing, text if not missing else f"{text}: run make setup")


def examine_model() -> Finding:
    try:
        return _finding("model", True, f"bundled checkpoint in {bundled_checkpoint()}")
    except CheckpointError as err:
        return _finding("model", False, str(err), otherwise="warn")


def examine_cpu() -> Finding:
    cores = count_cpus()
    host = NodeResources(node_id="", address="here", cpus=float(cores))
    default, local = (
        plan_shares(workers, [host]).threads
        for workers in (WorkersSection(device="cpu"), WorkersSection(device="cpu", mode="local"))
    )
    text = (
        f"{cores} cores for this process; compute threads: {default} in each of the default's "
        f"{WorkersSection().num_workers} workers, {local} in the one of --mode local"
    )
    return _finding("cpu", cores >= 2, text, otherwise="warn")


def examine_kernels() -> Finding:
    """Builds them where they are not built yet, as a worker would."""
    from workers.native.build import compilers
    from workers.native.library import find_library, is_built

    if not is_built() and compilers():
        note("building the CPU kernels, which may take a minute")
    found = find_library()
    return _finding("kernels", found.library is not None and not found.reason, found.words, "warn")


def examine_memory() -> Finding:
    import psutil

    free = int(psutil.virtual_memory().available)
    text = f"{free / 1e9:.1f} GB available, the demo takes about {MIN_MEMORY_BYTES / 1e9:.0f}"
    return _finding("memory", free >= MIN_MEMORY_BYTES, text, otherwise="warn")


def examine_shm() -> Finding:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return _finding("shm", False, "no /dev/shm: Ray uses files instead", otherwise="warn")
    free = shutil.disk_usage(shm).free
    text = f"{free / 1e6:.0f} MB free in {shm}"
    return _finding("shm", free >= OBJECT_STORE_BYTES, text, otherwise="warn")


def examine_ports() -> Finding:
    try:
        check_ports("127.0.0.1", DEFAULT_PORTS)
    except ConfigError as err:
        return _finding("ports", False, f"{err}: say --port and --grpc-port", otherwise="warn")
    return _finding("ports", True, " and ".join(map(str, DEFAULT_PORTS.values())) + " are free")


def examine_gpu() -> Finding:
    count = count_gpus()
    if count == 0:
        return _finding("gpu", True, "no NVIDIA GPU: the CPU path is used")
    try:
        probe = subprocess.run(
            [sys.executable, "-c", _TORCH_PROBE], capture_output=True, text=True, timeout=120
        )
    except subprocess.TimeoutExpired:
        return _finding("gpu", False, "torch does not answer within 120 s", otherwise="warn")
    is_usable = probe.stdout.startswith("True")
    words = f"torch sees CUDA and NCCL ({probe.stdout.strip()})"
    text = words if is_usable else "torch cannot use them: a CPU build, or no driver"
    return _finding("gpu", is_usable, f"{count} GPUs, {text}", otherwise="warn")


def examine_permissions() -> Finding:
    try:
        folder = make_temp_dir()
        folder.rmdir()
        with tempfile.TemporaryFile(dir=state_file.state_dir()):
            pass
    except (OSError, StartError) as err:
        return _finding("permissions", False, str(err))
    return _finding(
        "permissions", True, f"can write to {folder.parent} and {state_file.state_dir()}"
    )


def examine_leftovers() -> Finding:
    dead = [r.name for r in state_file.all_records() if not r.is_alive]
    text = f"left by a killed start: {', '.join(dead)}; the next start cleans up"
    return _finding("leftovers", not dead, text if dead else "none", otherwise="warn")


EXAMINATIONS: tuple[Callable[[], Finding], ...] = (
    examine_python,
    examine_packages,
    examine_model,
    examine_cpu,
    examine_kernels,
    examine_memory,
    examine_shm,
    examine_ports,
    examine_gpu,
    examine_permissions,
    examine_leftovers,
)
