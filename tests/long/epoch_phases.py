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
from workers.process.actor import AttentionWorker, ExpertWorker, WorkerActor
from workers.process.attention_runtime import AttentionRuntime
from workers.process.control.control_client import ControlClient
from workers.process.expert_runtime import ExpertRuntime
from workers.process.runtime import OnDeath, WorkerRuntime
from workers.process.worker_args import WorkerArgs


class PhaseRuntime(WorkerRuntime):
    """Kills a process when it sees a frame for the first time."""

    awaited: tuple[str, bool, int] | None = None
    """Name of the frame's class, whether this worker sends it, and the process."""

    def _open_control(self) -> ControlClient:
        control = super()._open_control()
        take, send = control._on_frame, control.send

        def look_and_take(frame: ControlFrame) -> None:
            self._look(frame, is_sent=False)
            take(frame)

        def look_and_send(frame: ControlFrame) -> None:
            self._look(frame, is_sent=True)
            send(frame)

        control._on_frame = look_and_take
        control.send = look_and_send  # type: ignore[method-assign]
        return control

    def _look(self, frame: ControlFrame, *, is_sent: bool) -> None:
        if self.awaited is not None and self.awaited[:2] == (type(frame).__name__, is_sent):
            pid, self.awaited = self.awaited[2], None
            with contextlib.suppress(ProcessLookupError):  # another worker was first
                os.kill(pid, signal.SIGKILL)


class PhaseAttention(PhaseRuntime, AttentionRuntime):
    """Of this role."""


class PhaseExpert(PhaseRuntime, ExpertRuntime):
    """Of this role."""


class PhaseWorker(WorkerActor):
    """The actor of either."""

    def arm(self, frame: str, is_sent: bool, pid: int) -> None:
        """Kill a process of this host at the next frame of that class."""
        assert isinstance(self._runtime, PhaseRuntime)
        self._runtime.awaited = frame, is_sent, pid


class PhaseAttentionWorker(PhaseWorker, AttentionWorker):
    """Of this role."""

    def _make_runtime(self, args: WorkerArgs, on_death: OnDeath) -> WorkerRuntime:
        return PhaseAttention(args, on_death)


class PhaseExpertWorker(PhaseWorker, ExpertWorker):
    """Of this role."""

    def _make_runtime(self, args: WorkerArgs, on_death: OnDeath) -> WorkerRuntime:
        return PhaseExpert(args, on_death)


PHASE_CLASSES: Final[Mapping[Role, type[WorkerActor]]] = {
    "attention": PhaseAttentionWorker,
    "expert": PhaseExpertWorker,
}
"""For ``RayCluster``."""
