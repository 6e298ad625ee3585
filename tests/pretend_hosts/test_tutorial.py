"""Who follows the tutorial of three hosts gets what it shows."""

from __future__ import annotations

import os
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
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
    shell = Shell(tmp_path, environment)
    yield shell
    shell.close()
    for state in tmp_path.glob("*/hosts"):  # where a command has failed before
        ending = Shell(tmp_path, {**environment, "NETSIM_STATE": str(state)})
        ending.run("tests/pretend_hosts/cluster.sh down", LIMIT_S)
        ending.close()


@pytest.mark.timeout(1800)
def test_three_hosts_are_as_the_page_shows(shell: Shell) -> None:
    check_page(PAGE, shell, LIMIT_S)
