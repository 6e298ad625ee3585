"""Scripts that complete the command line."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from cluster.cli.main import main
from cluster.cli.offline.completion import SHELLS
from cluster.cli.terminal.exit_codes import ExitCode


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_knows_commands_and_options(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == ExitCode.OK
    script = capsys.readouterr().out
    assert "rebalance" in script
    assert "dry-run" in script


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["completion", "bash"])
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    asked = (
        f"source {script}; COMP_WORDS=(expertmesh rebalance --dry); COMP_CWORD=2; "
        'COMP_LINE="expertmesh rebalance --dry"; $(complete -p expertmesh | '
        'sed "s/.*-F \\([^ ]*\\).*/\\1/") expertmesh --dry rebalance; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["--dry-run"], done.stderr
