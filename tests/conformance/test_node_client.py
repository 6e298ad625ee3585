"""The client that docs/reference/grpc.md generates for Node.js works as it is written there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gateway.stack import Stack
from tests.harness.clients import node_modules
from tests.paths import ROOT

pytestmark = pytest.mark.slow

LIMIT_S = 300


def test_the_generated_client_streams(stack: Stack, tmp_path: Path) -> None:
    packages = node_modules()
    folder = tmp_path / "docs" / "node-client"
    ignored = shutil.ignore_patterns("generated", "node_modules")
    shutil.copytree(ROOT / "docs" / "node-client", folder, ignore=ignored)
    (tmp_path / "protos").symlink_to(ROOT / "protos")
    (folder / "node_modules").symlink_to(packages)
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    made = subprocess.run(
        ["npm", "run", "generate"],  # with this Python's grpc_tools
        cwd=folder,
        env={**os.environ, "PATH": path},
        timeout=LIMIT_S,
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    command = ["node", "example.js", stack.grpc_target]
    done = subprocess.run(command, cwd=folder, timeout=LIMIT_S, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *text, ended, error = done.stdout.rstrip().splitlines()
    assert "".join(text)
    assert ended == "ended after 24 tokens"
    assert error.startswith("NOT_FOUND: the model 'other' does not exist")
