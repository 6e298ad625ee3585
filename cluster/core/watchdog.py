"""The controller's watchdog: a small process that kills the controller if its event loop hangs.

Ray restarts an actor whose process has ended, but not an actor that hangs, and without a controller
the cluster cannot recover from losses. The controller writes a byte (a beat) every ``BEAT_S``; this
file, run as a script, reads the beats. The watchdog ends when the pipe closes, as it does when the
controller ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

BEAT_S = 1.0
MAX_MISSING = 10
"""Number of consecutive beats of the controller that may be missing. A pause of the whole host
counts as one."""


def start_watchdog(beat_s: float = BEAT_S, log: Path | None = None) -> subprocess.Popen[bytes]:
    """Start the watchdog of the calling process, which must write beats to the ``stdin`` of the
    returned process.

    The watchdog appends its messages to the file ``log``, which it opens for each message, because
    log files are rotated. With None, it uses the caller's standard error.
    """
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(beat_s)]
    sink = None if log is None else subprocess.DEVNULL
    # its own session, so that signals to the controller's group do not reach it
    return subprocess.Popen(
        [*command, *([] if log is None else [str(log)])],
        stdin=subprocess.PIPE,
        stdout=sink,
        stderr=sink,
        bufsize=0,
        start_new_session=True,
    )


def _watch(pid: int, beat_s: float, log: str = "") -> None:
    """Read beats from stdin until it closes; kill the parent ``pid`` when too many beats are
    missing."""
    num_missing = 0
    while num_missing < MAX_MISSING:
        if not select.select([sys.stdin.fileno()], [], [], beat_s)[0]:
            num_missing += 1
        elif os.read(sys.stdin.fileno(), 4096):
            num_missing = 0
        else:
            return
    if os.getppid() == pid:
        os.kill(pid, signal.SIGKILL)
        _say(f"the controller (process {pid}) hung: it was killed\n", log)


def _say(line: str, log: str) -> None:
    """Write a line to standard error, or append it to the file ``log``; errors are ignored."""
    with contextlib.suppress(OSError):
        if log:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            os.dup2(os.open(log, flags, 0o644), sys.stderr.fileno())
        os.write(sys.stderr.fileno(), line.encode())


if __name__ == "__main__":
    _watch(int(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:])
