"""Who follows the tutorial of three hosts gets what it shows."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness.console import Shell, check_page
from tests.paths import ROOT
from tests.pretend_hosts.hosts import why_not

PAGE = ROOT / "docs" / "tutorial" / "three-hosts.md"
LIMIT_S = 300.0

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    if reason := why_not():
        pytest.skip(reason)
    for name in (".venv", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "home").mkdir()
    environment = {**os.environ, "HOME": str(tmp_path / "home")}
    shell = Shell(tmp_path, environment)
    yield shell
    shell.close()
    if (state := tmp_path / "build" / "hosts").exists():  # a command has failed before
        script = str(ROOT / "tests" / "pretend_hosts" / "cluster.sh")
        ending = {**environment, "NETSIM_STATE": str(state)}
        subprocess.run([script, "down"], env=ending, timeout=LIMIT_S, check=True)


@pytest.mark.timeout(1800)
def test_three_hosts_are_as_the_page_shows(shell: Shell) -> None:
    check_page(PAGE, shell, LIMIT_S)
