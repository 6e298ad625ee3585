"""The launcher: the process that owns a cluster. It starts, watches and ends the parts.

``expertmesh serve`` and ``up`` run it as ``python -m cluster.launch.launch`` in a session of its
own. It reads one ``LaunchPlan`` from stdin and writes one JSON event per line to stdout:
``progress``, ``note``, ``ready``, ``failed``, ``stopped``. It ends on SIGTERM, on the word
``drain`` after the running requests have ended, and when stdin closes unless the word ``detach``
was sent before, so that a killed CLI process also ends its cluster. Everything that the launcher
starts is a descendant of it or runs in its private Ray; a joined Ray keeps running. ``up`` in a
joined Ray is the exception: no process owns that cluster, and the launcher exits once it is ready.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, TextIO

from cluster.core.codec import from_plain
from cluster.core.errors import ConfigError, ExpertMeshError, first_line
from cluster.launch.orphans import host_id, identify
from cluster.launch.parts import ClusterParts, warm_up
from cluster.launch.plan import LaunchPlan, claim_ports
from cluster.launch.state_file import (
    ClusterRecord,
    RecordState,
    log_path,
    remove_log,
    remove_record,
    write_record,
)
from cluster.tracing import logs

logger = logging.getLogger("cluster.launch.launch")  # its __name__ is "__main__"

DETACH = "detach"
"""Word on stdin after which the launcher keeps running when the CLI process ends."""
DRAIN = "drain"
"""Word on stdin after which the launcher stops once the running requests have ended."""
_WATCH_S = 1.0
_STOP_LIMIT_S = 8.0
_DRAIN_POLL_S = 0.1


class _StopRequested(BaseException):
    """A stop was requested during the start.

    Raised on the main thread; ``except Exception`` does not catch this class.
    """


class EventSink:
    """Writes JSON events to the CLI process; events are lost if that process has ended."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    def send(self, event: str, **fields: Any) -> None:
        with self._lock:
            try:
                self._stream.write(json.dumps({"event": event, **fields}) + "\n")
                self._stream.flush()
            except (OSError, ValueError):
                logger.info("the CLI process did not read event %s", event)


class Launcher:
    """One run of the launcher, from the plan to the end of the cluster."""

    def __init__(self, plan: LaunchPlan, events: EventSink, make_parts: type[ClusterParts]) -> None:
        self._plan = plan
        self._events = events
        self._parts = make_parts(plan, self._progress)
        self._stop = threading.Event()
        self._second_stop = threading.Event()
        self._drains = False
        self._is_starting = True
        self._stage = ""
        self._claims: list[socket.socket] = []

    def run(self) -> int:
        """Start the cluster, wait for the reason to end it, and stop it; return the exit status."""
        self._install_handlers()
        status, has_left = 1, False
        try:
            self._start()
            status = 0 if self._outlives_launcher else self._watch()
            if self._drains and status == 0:
                self._drain()
            has_left = self._outlives_launcher
        except _StopRequested:
            logger.info("stop requested during the start")
            status = 0
        except ExpertMeshError as err:
            refused = isinstance(err, ConfigError)
            self._events.send("failed", message=str(err), refused=refused)
        except Exception as err:
            logger.exception("start failed")
            words = f"{type(err).__name__}: {first_line(err)}"  # Ray's errors are pages long
            message = f"{words}, see {log_path(self._plan.name)}"
            self._events.send("failed", message=message, refused=False)
        finally:
            self._is_starting = False
            self._end(status, has_left)
        return status

    def request_stop(self) -> None:
        """Request a stop. May be called on any thread."""
        os.kill(os.getpid(), signal.SIGTERM)  # the handler runs on the main thread

    def request_drain(self) -> None:
        """Request a stop after the running requests have ended. May be called on any thread."""
        self._drains = True
        self.request_stop()

    def _start(self) -> None:
        section = self._plan.config.gateway
        if not self._plan.address:
            self._claims = claim_ports(section.host, section.public_ports)
        self._record("starting", address="")
        address = self._parts.start_ray()
        self._install_handlers()  # Ray installs its own
        self._record("starting", address)
        self._parts.start_services()
        self._record("ready", address)
        self._is_starting = False
        if threads := self._parts.compute_threads:
            logger.info("%s", threads)
            self._events.send("note", text=threads)
        logger.info("ready")
        plan = self._parts.plan
        admin = self._parts.admin
        self._events.send("ready", http=plan.http_url, grpc=plan.grpc_target, admin=admin)

    @property
    def _outlives_launcher(self) -> bool:
        """Whether the cluster continues without this process (command ``up`` in a joined Ray)."""
        return bool(self._plan.address) and self._plan.command == "up"

    def _watch(self) -> int:
        """Wait until a stop is requested or the cluster is lost; return the exit status."""
        while not self._stop.wait(_WATCH_S):
            lost = self._parts.find_loss()
            if lost is not None:
                self._events.send("failed", message=lost, refused=False)
                return 1
        return 0

    def _drain(self) -> None:
        """Wait while load balancers redirect clients, and then until running requests have ended.

        Each wait has a time limit, and a second stop request ends both.
        """
        section = self._parts.plan.config.gateway
        logger.info("draining")
        self._parts.send_shutdown_stage("lead")
        self._second_stop.wait(section.drain_lead_s)
        give_up = time.monotonic() + section.drain_timeout_s
        while not self._second_stop.is_set() and self._parts.send_shutdown_stage("refuse"):
            left_s = give_up - time.monotonic()
            if left_s <= 0:
                logger.warning("requests still run after %g s", section.drain_timeout_s)
                return
            self._second_stop.wait(min(_DRAIN_POLL_S, left_s))

    def _end(self, status: int, has_left: bool) -> None:
        """End the services within a time limit, then Ray.

        ``has_left``: whether the cluster continues without the launcher, so that the services stay.
        """
        if not has_left:
            helper = threading.Thread(target=self._parts.stop_services, daemon=True)
            helper.start()
            helper.join(_STOP_LIMIT_S - 3.0)
        self._parts.stop_ray()
        if not self._outlives_launcher:
            remove_record(self._plan.name)
        if status == 0:
            remove_log(self._plan.name)
        self._events.send("stopped")

    def _progress(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage = stage
            logger.info("stage %s", stage)
        self._events.send("progress", stage=stage, done=done, total=total)

    def _record(self, state: RecordState, address: str) -> None:
        if self._outlives_launcher and state != "ready":
            return  # nothing on this host needs a clean-up, and an earlier record stays valid
        plan = self._parts.plan
        me = identify(os.getpid())
        assert me is not None
        write_record(
            ClusterRecord(
                name=plan.name,
                command=plan.command,
                state=state,
                launcher=me,
                host=host_id(),
                asked=plan.asked,
                http=plan.http_url,
                grpc=plan.grpc_target,
                address=address,
                joined=bool(plan.address),
                temp_dir=plan.temp_dir,
                processes=tuple(self._parts.processes()),
            )
        )

    def _install_handlers(self) -> None:
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the CLI process forwards it as SIGTERM
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._stop.is_set():
            self._second_stop.set()
        self._stop.set()
        if self._is_starting:
            self._is_starting = False
            raise _StopRequested


def _follow_cli(stream: TextIO, launcher: Launcher) -> None:
    """Stop the launcher when the CLI process ends, unless that process has sent ``DETACH``.

    After ``DRAIN``, the running requests end first.
    """
    for line in stream:
        if line.strip() == DETACH:
            return
        if line.strip() == DRAIN:
            launcher.request_drain()
    logger.info("the CLI process has ended")
    launcher.request_stop()


def _redirect_stdout() -> TextIO:
    """Return the original stdout for events, and redirect stdout to stderr, which is the log."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return events


def main(
    make_parts: type[ClusterParts] = ClusterParts, warm_up: Callable[[], None] = warm_up
) -> NoReturn:
    """Entry point of the launcher process."""
    events = EventSink(_redirect_stdout())
    logs.set_up("launcher")
    warm_up()
    line = sys.stdin.readline()
    if not line:
        sys.exit(0)  # rejected or killed before anything was started
    plan = from_plain(json.loads(line), LaunchPlan)
    logs.set_up("launcher", plan.config.observability.log_format)
    logs.OUTPUT.add_file(log_path(plan.name))
    launcher = Launcher(plan, events, make_parts)
    threading.Thread(target=_follow_cli, args=(sys.stdin, launcher), daemon=True).start()
    status = launcher.run()
    logging.shutdown()
    os._exit(status)  # daemon threads of an abandoned start must not delay the end


if __name__ == "__main__":
    main()
