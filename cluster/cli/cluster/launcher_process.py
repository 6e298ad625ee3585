"""The launcher's parent process, ``serve`` or ``up``: starts, shows and stops the launcher.

The launcher owns the cluster. Two pipes connect the processes: if this process dies, the launcher
stops the cluster; if the launcher dies, this process ends the rest of the cluster.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from cluster.cli.terminal.exit_codes import CommandError, ExitCode
from cluster.cli.terminal.output import note
from cluster.cli.terminal.progress import Progress
from cluster.launch import state_file
from cluster.launch.launch import DETACH, DRAIN
from cluster.launch.orphans import end_private_ray
from cluster.launch.plan import LaunchPlan

PARENT_VARIABLE = "EXPERTMESH_PARENT"
"""Variable with the process id of ``make serve``; the server stops when that process ends."""
_TICK_S = 0.25
_QUIET_TICK_S = 1.0


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived before a launcher runs."""


def raise_on_signals() -> None:
    """Make SIGINT and SIGTERM raise ``Interrupted`` until a launcher runs.

    Applies even if the shell has started this process with SIGINT ignored, as for ``command &``.
    """

    def handle(number: int, frame: FrameType | None) -> NoReturn:
        raise Interrupted

    for number in _signals():
        signal.signal(number, handle)


def _signals() -> list[signal.Signals]:
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # under nohup it stays ignored
        numbers.append(signal.SIGHUP)
    return numbers


class LauncherProcess:
    """One launcher process, from its start to its end."""

    def __init__(
        self,
        log: Path,
        environment: Mapping[str, str],
        on_ready: Callable[[str, str, Mapping[str, str]], None],
        module: str = "cluster.launch.launch",
        stop_limit_s: float = 9.0,
    ) -> None:
        """Spawn the launcher, which imports its modules and waits for ``begin``.

        ``on_ready`` is called with the HTTP URL, the gRPC ``host:port`` and the admin addresses by
        kind. The launcher is killed ``stop_limit_s`` after the first signal, or after the end of
        the running requests.
        """
        self._on_ready = on_ready
        self._log = log
        self._stop_limit_s = stop_limit_s
        with log.open("wb") as errors:
            self._child = subprocess.Popen(
                [sys.executable, "-m", module],
                env=dict(environment),
                cwd="/",  # Ray adds it to the workers' import path: not a folder of the user
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self._plan: LaunchPlan | None = None
        self._signal_count = 0
        self._first_signal = 0
        self._deadline: float | None = None
        self._stopped = False
        self._buffer = b""
        self._failure: CommandError | None = None
        self._was_ready = False
        self._detaches = False

    def begin(self, plan: LaunchPlan) -> None:
        """Send the plan to the launcher, which then starts the cluster and must be stopped."""
        self._plan = plan
        for number in _signals():
            signal.signal(number, self._on_signal)
        self._send_line(json.dumps(asdict(plan)))

    def cancel(self) -> None:
        """Kill the launcher, which has not received a plan (``begin``) yet."""
        self._child.kill()
        self._close_pipes()
        self._child.wait()

    def run(self, progress: Progress, detach: bool) -> ExitCode:
        """Show progress until the cluster is ready, then wait for the end of the launcher.

        With ``detach``, returns once the cluster is ready. A signal sets a deadline for the
        launcher's end, which every tick checks. Raises ``CommandError`` if the launcher failed.
        """
        assert self._child.stdout is not None
        self._detaches = detach
        events = self._child.stdout.fileno()
        while True:
            is_quiet = self._was_ready and self._deadline is None
            if select.select([events], [], [], _QUIET_TICK_S if is_quiet else _TICK_S)[0]:
                data = os.read(events, 65536)
                if not data:
                    progress.clear()
                    return self._clean_up()
                self._handle_events(data, progress)
            if self._was_ready and detach and self._signal_count == 0:
                self._detach()
                return ExitCode.OK
            if not self._was_ready and self._signal_count == 0:
                progress.tick()
            self._enforce_deadline()
            self._follow_parent()

    def _handle_events(self, data: bytes, progress: Progress) -> None:
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            event: dict[str, Any] = json.loads(line)
            kind = event["event"]
            if kind == "progress":
                progress.update(event["stage"], event["done"], event["total"])
            elif kind == "note":
                progress.clear()
                note(event["text"])
            elif kind == "ready":
                progress.clear()
                self._was_ready = True
                self._on_ready(event["http"], event["grpc"], event["admin"])
            elif kind == "failed":
                code = ExitCode.REFUSED if event["refused"] else ExitCode.FAILED
                self._failure = CommandError(code, event["message"])
            elif kind == "stopped":
                self._stopped = True

    def _clean_up(self) -> ExitCode:
        """End everything that the ended launcher has left running; return the exit code.

        Raises ``CommandError`` if no signal has caused the end.
        """
        assert self._plan is not None
        self._child.wait()
        self._close_pipes()
        if not self._stopped:
            record = state_file.read_record(self._plan.name)
            if self._plan.temp_dir:
                end_private_ray(Path(self._plan.temp_dir), record.processes if record else ())
            if record is None or not record.is_detached:
                state_file.remove_record(self._plan.name)
        if self._signal_count:
            state_file.remove_log(self._plan.name)
            is_clean_end = self._first_signal != signal.SIGINT and self._was_ready
            return ExitCode.OK if is_clean_end else ExitCode.INTERRUPTED
        message = f"the launcher ended unexpectedly, see {self._log}"
        raise self._failure or CommandError(ExitCode.FAILED, message)

    def _detach(self) -> None:
        self._send_line(DETACH)
        self._close_pipes()
        self._child.returncode = 0  # suppress the warning about a child that keeps running

    def _close_pipes(self) -> None:
        for pipe in (self._child.stdin, self._child.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal_count += 1
        self._first_signal = self._first_signal or number
        if self._signal_count > 1:
            self._deadline = time.monotonic()
        elif number == signal.SIGTERM and self._was_ready and not self._detaches:
            self._drain()
        else:
            self._stop()

    def _stop(self) -> None:
        self._deadline = time.monotonic() + self._stop_limit_s
        note("stopping")
        with contextlib.suppress(ProcessLookupError):
            self._child.send_signal(signal.SIGTERM)

    def _drain(self) -> None:
        assert self._plan is not None
        section = self._plan.config.gateway
        drain_s = section.drain_lead_s + section.drain_timeout_s
        self._deadline = time.monotonic() + drain_s + self._stop_limit_s
        note("stopping once the running requests have ended")
        self._send_line(DRAIN)

    def _enforce_deadline(self) -> None:
        """Kill the launcher if its deadline has passed; this closes the launcher's pipe."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            self._child.kill()

    def _follow_parent(self) -> None:
        """Send SIGINT to this process if the process in ``PARENT_VARIABLE`` has ended."""
        parent = os.environ.get(PARENT_VARIABLE)
        if parent and parent != str(os.getppid()) and self._signal_count == 0:
            os.kill(os.getpid(), signal.SIGINT)

    def _send_line(self, line: str) -> None:
        assert self._child.stdin is not None
        if self._child.stdin.closed:
            return  # a signal arrived after the launcher's end
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.write(f"{line}\n".encode())
            self._child.stdin.flush()
