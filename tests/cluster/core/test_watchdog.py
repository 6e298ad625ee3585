"""A process that hangs is ended by its watchdog, and nothing else is."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from benchmarks.harness.stalls import wait_until

pytestmark = pytest.mark.distributed

LIMIT_S = 120.0
_WATCHED = """
import os, signal, sys, time
from pathlib import Path
from cluster.core.watchdog import MAX_MISSING, start_watchdog
log = Path({log!r}) if {log!r} else None
watchdog = start_watchdog(0.02, log)
print(watchdog.pid, flush=True)
for _ in range(3 * MAX_MISSING):
    watchdog.stdin.write(b".")
    time.sleep(0.02)
{end}
"""


def _watched(end: str, log: str = "") -> tuple[subprocess.Popen[str], psutil.Process]:
    """A process that beats for a while, and its watchdog."""
    command = [sys.executable, "-c", _WATCHED.format(end=end, log=log)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process.stdout:
        return process, psutil.Process(int(process.stdout.readline()))


@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), signal.SIGSTOP)", "time.sleep(3600)"], ids=["stopped", "hangs"]
)
def test_a_process_that_stands_still_is_killed(end: str) -> None:
    process, watchdog = _watched(end)
    assert process.wait(LIMIT_S) == -signal.SIGKILL
    wait_until(lambda: not watchdog.is_running(), "the end of the watchdog")


def test_a_watchdog_writes_to_the_log_file_that_is_there_at_the_end(tmp_path: Path) -> None:
    """It keeps none open that was rotated since its beginning."""
    log = tmp_path / "worker-ab-01-11.err"
    log.write_text("a line\n")
    process, watchdog = _watched(
        f"os.rename({str(log)!r}, {str(log)!r} + '.1'); time.sleep(3600)", str(log)
    )
    wait_until(lambda: not watchdog.open_files(), "only its pipe is open, once it has started")
    process.wait(LIMIT_S)
    wait_until(lambda: not watchdog.is_running(), "the end of the watchdog")
    assert log.read_text() == f"the controller (process {process.pid}) hung: it was killed\n"


def test_a_watchdog_ends_with_its_process() -> None:
    process, watchdog = _watched("sys.exit(7)")
    assert process.wait(LIMIT_S) == 7
    wait_until(lambda: not watchdog.is_running(), "the end of the watchdog")
