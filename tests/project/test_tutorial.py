"""Who follows the first tutorial, or the page on checkpoints, gets what the page shows."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.console import Shell, check_page
from tests.paths import ROOT

FIRST = ROOT / "docs" / "tutorial" / "first-cluster.md"
CHECKPOINT = ROOT / "docs" / "how-to" / "own-checkpoint.md"
LIMIT_S = 900.0
"""Of one command; the installation is the longest."""
FREE_PORTS = (8000, 50051)
"""The page shows them, so they must not be in use."""
_OF_NETWORK = re.compile(r"PIP_|SSL_CERT_|\w+_proxy$", re.IGNORECASE)
"""Variables with which pip reaches its packages."""


def copy_of_sources(folder: Path) -> Path:
    """What git has or would add, without what was built or installed."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def newcomers_environment(home: Path) -> dict[str, str]:
    """An empty home, and no environment that is active; pip's packages come from where they do."""
    active = os.environ.get("VIRTUAL_ENV", str(ROOT / ".venv"))
    path = os.environ["PATH"].split(os.pathsep)
    environment = {name: text for name, text in os.environ.items() if _OF_NETWORK.match(name)}
    configured = Path.home() / ".config" / "pip" / "pip.conf"
    if configured.exists():
        environment.setdefault("PIP_CONFIG_FILE", str(configured))
    path = [folder for folder in path if not folder.startswith(active)]
    return {**environment, "HOME": str(home), "PATH": os.pathsep.join(path), "LANG": "C.UTF-8"}


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    for port in FREE_PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    (tmp_path / "home").mkdir()
    sources = copy_of_sources(tmp_path / "sources")
    shell = Shell(sources, newcomers_environment(tmp_path / "home"))
    yield shell
    shell.close()
    ending = Shell(sources, newcomers_environment(tmp_path / "home"))
    ending.run(".venv/bin/expertmesh down -y", LIMIT_S)  # where a command has failed before
    ending.close()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_first_cluster_is_as_the_page_shows(shell: Shell) -> None:
    check_page(FIRST, shell, LIMIT_S)


@pytest.mark.slow
def test_a_checkpoint_is_checked_as_the_page_shows(tmp_path: Path) -> None:
    """In a folder with the sources' programs, since the page leaves files in it for a while."""
    for name in (".venv", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    shell = Shell(tmp_path, {**os.environ, "COLUMNS": "200"})
    try:
        check_page(CHECKPOINT, shell, LIMIT_S)
    finally:
        shell.close()
