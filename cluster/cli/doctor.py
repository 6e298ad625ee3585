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
from typing import Any, Literal

from cluster import state_file
from cluster.cli.exit_codes import ExitCode
from cluster.cli.terminal import colour, out_json, out_line
from cluster.cli.version import versions
from cluster.errors import CheckpointError, ConfigError, StartError
from cluster.launch_plan import check_ports, count_cpus, count_gpus
from cluster.local_ray import OBJECT_STORE_BYTES, make_temp_dir, remove
from cluster.model_source import bundled_checkpoint

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


def add_commands(commands: Any, common: argparse.ArgumentParser) -> None:
    """Register ``doctor``."""
    parser = commands.add_parser("doctor", parents=[common], help="examine this host")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print all findings; ``FAILED`` when one is bad."""
    findings = [examine() for examine in EXAMINATIONS]
    is_fine = all(f.verdict != "bad" for f in findings)
    if args.json:
        out_json({"schema": 1, "ok": is_fine, "findings": [asdict(f) for f in findings]})
        return ExitCode.OK if is_fine else ExitCode.FAILED
    colours = {"ok": "green", "warn": "yellow", "bad": "red"}
    for f in findings:
        mark = colour(f.verdict.ljust(4), colours[f.verdict], not args.no_color)
        out_line(f"{mark} {f.what.ljust(12)} {f.text}")
    return ExitCode.OK if is_fine else ExitCode.FAILED


def _finding(what: str, is_ok: bool, text: str, otherwise: Verdict = "bad") -> Finding:
    return Finding(what=what, verdict="ok" if is_ok else otherwise, text=text)


def examine_python() -> Finding:
    """Version of the interpreter."""
    text = f"{sys.version.split()[0]} at {sys.executable}"
    return _finding("python", sys.version_info >= (3, 11), text)


def examine_packages() -> Finding:
    """Ray, torch and the rest."""
    found = versions()
    missing = [name for name, number in found.items() if number is None]
    text = ", ".join(f"{name} {number or 'missing'}" for name, number in found.items())
    return _finding("packages", not missing, text if not missing else f"{text}: run make setup")


def examine_model() -> Finding:
    """The bundled checkpoint."""
    try:
        return _finding("model", True, f"bundled checkpoint in {bundled_checkpoint()}")
    except CheckpointError as err:
        return _finding("model", False, str(err), otherwise="warn")


def examine_cpu() -> Finding:
    """Cores for this process."""
    cores = count_cpus()
    return _finding("cpu", cores >= 2, f"{cores} cores for this process", otherwise="warn")


def examine_memory() -> Finding:
    """Free memory."""
    import psutil

    free = int(psutil.virtual_memory().available)
    text = f"{free / 1e9:.1f} GB available, the demo takes about {MIN_MEMORY_BYTES / 1e9:.0f}"
    return _finding("memory", free >= MIN_MEMORY_BYTES, text, otherwise="warn")


def examine_shm() -> Finding:
    """Shared memory, where Ray keeps its object store."""
    shm = Path("/dev/shm")
    if not shm.is_dir():
        return _finding("shm", False, "no /dev/shm: Ray uses files instead", otherwise="warn")
    free = shutil.disk_usage(shm).free
    text = f"{free / 1e6:.0f} MB free in {shm}"
    return _finding("shm", free >= OBJECT_STORE_BYTES, text, otherwise="warn")


def examine_ports() -> Finding:
    """The default ports."""
    try:
        check_ports("127.0.0.1", DEFAULT_PORTS)
    except ConfigError as err:
        return _finding("ports", False, f"{err}: say --port and --grpc-port", otherwise="warn")
    return _finding("ports", True, " and ".join(map(str, DEFAULT_PORTS.values())) + " are free")


def examine_gpu() -> Finding:
    """GPUs, and whether torch and NCCL can use them."""
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
    """Folders that a start writes to."""
    try:
        folder = make_temp_dir()
        remove(folder)
        with tempfile.TemporaryFile(dir=state_file.state_dir()):
            pass
    except (OSError, StartError) as err:
        return _finding("permissions", False, str(err))
    return _finding(
        "permissions", True, f"can write to {folder.parent} and {state_file.state_dir()}"
    )


def examine_leftovers() -> Finding:
    """What a killed start left behind."""
    dead = [r.name for r in state_file.all_records() if not r.is_alive]
    text = f"left by a killed start: {', '.join(dead)}; the next start cleans up"
    return _finding("leftovers", not dead, text if dead else "none", otherwise="warn")


EXAMINATIONS: tuple[Callable[[], Finding], ...] = (
    examine_python,
    examine_packages,
    examine_model,
    examine_cpu,
    examine_memory,
    examine_shm,
    examine_ports,
    examine_gpu,
    examine_permissions,
    examine_leftovers,
)
