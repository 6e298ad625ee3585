"""The client that docs/grpc.md generates for Node.js works as it is written there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gateway.stack import Stack
from tests.paths import ROOT

pytestmark = pytest.mark.slow

LIMIT_S = 300


def test_the_generated_client_streams(stack: Stack, tmp_path: Path) -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    folder = tmp_path / "docs" / "node-client"
    ignored = shutil.ignore_patterns("generated", "node_modules")
    shutil.copytree(ROOT / "docs" / "node-client", folder, ignore=ignored)
    (tmp_path / "protos").symlink_to(ROOT / "protos")
    wanted = json.loads((folder / "package.json").read_text())["dependencies"]
    known = Path(os.environ.get("EXPERTMESH_NODE_MODULES", "/nowhere"))
    if all((known / name).is_dir() for name in wanted):
        (folder / "node_modules").symlink_to(known)
    else:
        done = npm(folder, "install", "--no-audit", "--no-fund")
        if done is None or done.returncode:
            pytest.skip("npm cannot install: set EXPERTMESH_NODE_MODULES")
    made = npm(folder, "run", "generate")
    assert made is not None
    assert made.returncode == 0, made.stderr
    command = ["node", "example.js", stack.grpc_target]
    done = subprocess.run(command, cwd=folder, timeout=LIMIT_S, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *text, ended, error = done.stdout.rstrip().splitlines()
    assert "".join(text)
    assert ended == "ended after 24 tokens"
    assert error.startswith("NOT_FOUND: the model 'other' does not exist")


def npm(folder: Path, *words: str) -> subprocess.CompletedProcess[str] | None:
    """Run npm with this Python's grpc_tools; None where it takes too long."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    try:
        return subprocess.run(
            ["npm", *words],
            cwd=folder,
            env={**os.environ, "PATH": path},
            timeout=LIMIT_S,
            capture_output=True,
            text=True,
        )
    except subprocess.TimeoutExpired:
        return None
