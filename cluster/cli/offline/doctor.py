"""``doctor``: checks whether this host has everything that serving needs."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli.offline.finding import Finding, make_finding
from cluster.cli.offline.host_limits import (
    examine_disk,
    examine_files,
    examine_huge_pages,
    examine_threads,
)
from cluster.cli.offline.version import versions
from cluster.cli.terminal.arguments import CommandParsers
from cluster.cli.terminal.exit_codes import ExitCode
from cluster.cli.terminal.output import colour, note, show
from cluster.cli.terminal.progress import Progress
from cluster.config.resources import NodeResources, plan_shares
from cluster.config.workers import WorkersSection
from cluster.core.errors import CheckpointError, ConfigError, StartError
from cluster.core.process import count_cpus
from cluster.launch import state_file
from cluster.launch.local_ray import OBJECT_STORE_BYTES, make_temp_dir
from cluster.launch.model_source import bundled_checkpoint
from cluster.launch.plan import check_ports, count_gpus

if TYPE_CHECKING:
    from workers.native.library import LibraryChoice

MIN_MEMORY_BYTES = 3 << 30
DEFAULT_PORTS = {"port": 8000, "grpc_port": 50051}
NOT_USABLE = "torch cannot use them: it is a build for CPUs, or the driver is missing or too old"
_PROBE_S = 120.0
_TORCH_PROBE = """
import json, torch
has_cuda = torch.cuda.is_available()
nccl = ".".join(map(str, torch.cuda.nccl.version())) if has_cuda else None
print(json.dumps({"cuda": has_cuda, "cuda_version": torch.version.cuda, "nccl": nccl}))
"""


def add_commands(commands: CommandParsers) -> None:
    commands.add("doctor", run, "check whether this host can serve")


def run(args: argparse.Namespace) -> int:
    """Print all findings about this host; return ``FAILED`` if any finding is bad."""
    findings = []
    with Progress(lines=False) as progress:
        for place, examine in enumerate(EXAMINATIONS, 1):
            progress.update(f"examination {place} of {len(EXAMINATIONS)}")
            findings.append(examine())
    is_fine = all(f.verdict != "bad" for f in findings)
    document = {"schema": 1, "ok": is_fine, "findings": [asdict(f) for f in findings]}
    show(args, document, "\n".join(_line(f, not args.no_color) for f in findings))
    return ExitCode.OK if is_fine else ExitCode.FAILED


def _line(found: Finding, colours: bool) -> str:
    name = {"ok": "green", "warn": "yellow", "bad": "red"}[found.verdict]
    mark = colour(found.verdict.ljust(4), name, colours)
    return f"{mark} {found.what.ljust(12)} {found.text}"


def examine_python() -> Finding:
    text = f"{sys.version.split()[0]} at {sys.executable}"
    return make_finding(
        "python", sys.version_info >= (3, 11), text, fix="install Python 3.11 or newer"
    )


def examine_packages() -> Finding:
    found = versions()
    missing = [name for name, number in found.items() if number is None]
    text = ", ".join(f"{name} {number or 'missing'}" for name, number in found.items())
    return make_finding("packages", not missing, text, fix="run make setup")


def examine_model() -> Finding:
    try:
        return make_finding("model", True, f"bundled checkpoint in {bundled_checkpoint()}")
    except CheckpointError as err:
        return make_finding("model", False, str(err), otherwise="warn")


def examine_cpu() -> Finding:
    cores = count_cpus()
    host = NodeResources(node_id="", address="here", cpus=float(cores))
    default, local = (
        plan_shares(workers, [host]).threads
        for workers in (WorkersSection(device="cpu"), WorkersSection(device="cpu", mode="local"))
    )
    text = (
        f"{cores} cores for this process; compute threads: {default} in each of the default's "
        f"{WorkersSection().num_workers} workers, {local} in the only worker of --mode local"
    )
    fix = "--mode local fits one core best"
    return make_finding("cpu", cores >= 2, text, fix=fix, otherwise="warn")


def examine_kernels() -> Finding:
    """Check the compiled kernels, and build them if necessary, as a worker would."""
    from workers.native.build import compilers
    from workers.native.library import InstructionsError, find_library, is_built

    try:
        if not is_built() and compilers():
            note("building the CPU kernels, which may take a minute")
        return kernels_finding(find_library())
    except InstructionsError as err:
        return make_finding("kernels", False, str(err))


def kernels_finding(found: LibraryChoice) -> Finding:
    """Make the finding about kernels; a warning unless the processor's best kernels are used."""
    is_best = found.library is not None and not found.reason
    return make_finding("kernels", is_best, found.description, otherwise="warn")


def examine_memory() -> Finding:
    import psutil

    free = int(psutil.virtual_memory().available)
    text = f"{free / 1e9:.1f} GB available, the demo takes about {MIN_MEMORY_BYTES / 1e9:.0f} GB"
    fix = "end other programs, or serve with --mode local"
    return make_finding("memory", free >= MIN_MEMORY_BYTES, text, fix=fix, otherwise="warn")


def examine_shm() -> Finding:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return make_finding("shm", False, "no /dev/shm: Ray uses files instead", otherwise="warn")
    free = shutil.disk_usage(shm).free
    text = f"{free / 1e6:.0f} MB free in {shm}"
    fix = f"{OBJECT_STORE_BYTES / 1e6:.0f} MB are needed (docker run --shm-size 1g)"
    return make_finding("shm", free >= OBJECT_STORE_BYTES, text, fix=fix, otherwise="warn")


def examine_ports() -> Finding:
    try:
        check_ports("127.0.0.1", DEFAULT_PORTS)
    except ConfigError as err:
        return make_finding(
            "ports", False, f"{err}: choose others with --port and --grpc-port", otherwise="warn"
        )
    return make_finding("ports", True, " and ".join(map(str, DEFAULT_PORTS.values())) + " are free")


def examine_gpu() -> Finding:
    """Check the GPUs, and whether torch can use them."""
    count = count_gpus()
    if count == 0:
        return make_finding("gpu", True, "no NVIDIA GPU: the CPU path is used")
    found, problem = _probe_torch()
    if not found.get("cuda"):
        fix = "run make clean setup on this host, which chooses torch's build by nvidia-smi"
        text = f"{count} GPUs, {problem or NOT_USABLE}"
        return make_finding("gpu", False, text, fix=fix, otherwise="warn")
    return make_finding(
        "gpu", True, f"{count} GPUs; torch is built with CUDA {found['cuda_version']}"
    )


def examine_nccl() -> Finding:
    """Check NCCL, over which workers on GPUs exchange rows; show the variables of NCCL."""
    if count_gpus() == 0:
        return make_finding(
            "nccl", True, "not needed: workers on CPUs exchange tokens over sockets"
        )
    found, problem = _probe_torch()
    given = sorted(name for name in os.environ if name.startswith("NCCL_"))
    text = f"{found.get('nccl') or 'none'}; set here: {', '.join(given) or 'nothing'}"
    fix = f"{problem or NOT_USABLE}: torch's builds with CUDA bring NCCL"
    return make_finding("nccl", bool(found.get("nccl")), text, fix=fix, otherwise="warn")


@cache
def _probe_torch() -> tuple[dict[str, Any], str]:
    """Return facts about torch, and an error text or "".

    Runs in a child process, because the import of torch takes seconds.
    """
    command = [sys.executable, "-c", _TORCH_PROBE]
    try:
        probe = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_S)
        return json.loads(probe.stdout), ""
    except subprocess.TimeoutExpired:
        return {}, f"torch does not answer within {_PROBE_S:g} s"
    except ValueError:
        last = probe.stderr.strip().splitlines()[-1:]
        return {}, f"torch cannot be imported ({' '.join(last)})"


def examine_permissions() -> Finding:
    try:
        folder = make_temp_dir()
        folder.rmdir()
        with tempfile.TemporaryFile(dir=state_file.state_dir()):
            pass
    except (OSError, ConfigError, StartError) as err:
        return make_finding("permissions", False, str(err))
    return make_finding(
        "permissions", True, f"can write to {folder.parent} and {state_file.state_dir()}"
    )


def examine_leftovers() -> Finding:
    dead = [r.name for r in state_file.all_records() if not r.is_alive]
    text = f"left by a killed start: {', '.join(dead)}; the next start cleans up"
    return make_finding("leftovers", not dead, text if dead else "none", otherwise="warn")


EXAMINATIONS: tuple[Callable[[], Finding], ...] = (
    examine_python,
    examine_packages,
    examine_model,
    examine_cpu,
    examine_kernels,
    examine_huge_pages,
    examine_memory,
    examine_shm,
    examine_disk,
    examine_threads,
    examine_files,
    examine_ports,
    examine_gpu,
    examine_nccl,
    examine_permissions,
    examine_leftovers,
)
