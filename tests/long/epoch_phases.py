"""Workers at which the controller of a cluster dies, in a phase of a change of the placement.

A worker sees every phase as a frame of the controller that it gets, or its own answer. The one that
is first to see the awaited frame kills the controller's process before it goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Mapping
from typing import Final

from cluster.core.frames import ControlFrame
from cluster.core.topology import Role
from workers.process.worker.actor import WorkerActor
from workers.process.worker.worker import OnDeath, Worker
from workers.process.worker_args import WorkerArgs


class PhaseWorker(Worker):
    """Kills a process when it sees a frame for the first time."""

    awaited: tuple[str, bool, int] | None = None
    """Name of the frame's class, whether this worker sends it, and the process."""

    def __init__(self, args: WorkerArgs, on_death: OnDeath) -> None:
        super().__init__(args, on_death)
        client = self.control._client
        take, send = client._on_frame, client.send

        def look_and_take(frame: ControlFrame) -> None:
            self._look(frame, is_sent=False)
            take(frame)

        def look_and_send(frame: ControlFrame) -> None:
            self._look(frame, is_sent=True)
            send(frame)

        client._on_frame = look_and_take
        client.send = look_and_send  # type: ignore[method-assign]

    def _look(self, frame: ControlFrame, *, is_sent: bool) -> None:
        if self.awaited is not None and self.awaited[:2] == (type(frame).__name__, is_sent):
            pid, self.awaited = self.awaited[2], None
            with contextlib.suppress(ProcessLookupError):  # another worker was first
                os.kill(pid, signal.SIGKILL)


class PhaseActor(WorkerActor):
    """The actor of either role."""

    def arm(self, frame: str, is_sent: bool, pid: int) -> None:
        """Kill a process of this host at the next frame of that class."""
        assert isinstance(self._worker, PhaseWorker)
        self._worker.awaited = frame, is_sent, pid

    def _make_worker(self, args: WorkerArgs, on_death: OnDeath) -> Worker:
        return PhaseWorker(args, on_death)


PHASE_CLASSES: Final[Mapping[Role, type[WorkerActor]]] = {
    "attention": PhaseActor,
    "expert": PhaseActor,
}
"""For ``RayCluster``."""
