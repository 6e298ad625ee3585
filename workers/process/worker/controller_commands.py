"""Passes the controller's commands from the control thread to the data thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cluster.core.frames import (
    ControlFrame,
    ControllerSnapshot,
    ExpertsLoaded,
    LoadExperts,
    NewGeneration,
    RunGeneration,
    Shutdown,
    SnapshotKept,
)
from workers.process.control.membership import Membership
from workers.process.roles.experts import ExpertRole


@dataclass(kw_only=True, slots=True)
class ControllerCommands:
    """Queue of controller commands for the data thread. ``take``, ``report``: control thread."""

    membership: Membership
    experts: Callable[[], ExpertRole | None]
    """Returns the experts role, or None until its slots are filled."""
    send: Callable[[ControlFrame], None]
    """Sends a frame to the controller."""
    wake: Callable[[], None]
    """Wakes the data thread from a wait for a step."""
    interrupt: Callable[[int], None]
    """Interrupts the data thread's step, because the generation of this number will follow."""
    _frames: deque[ControlFrame] = field(default_factory=deque)
    _memory: dict[str, Any] = field(default_factory=dict)

    def take(self, frame: ControlFrame) -> None:
        """Carry out a frame, or queue it for the data thread and end that thread's wait or step."""
        experts = self.experts()
        if isinstance(frame, LoadExperts):
            if experts is not None:
                experts.handle_command(frame)
            else:
                self.send(ExpertsLoaded(order=frame.order, error="there are no expert slots"))
            return
        if isinstance(frame, ControllerSnapshot):
            self._memory = frame.memory
            self.membership.record_command(frame)
            self.send(SnapshotKept(version=frame.version))
            return
        if isinstance(frame, RunGeneration) and experts is not None:
            self._free_experts(experts, frame)
        self.membership.record_command(frame)
        self._frames.append(frame)
        if isinstance(frame, NewGeneration):
            if experts is not None:
                experts.cancel_migrations()
            self.interrupt(frame.generation.number)
        elif isinstance(frame, Shutdown):
            self.interrupt(self.membership.generation.number + 1)
        else:
            self.wake()

    def report(self) -> list[ControlFrame]:
        """Return the frames with this worker's state that a restarted controller needs."""
        return self.membership.worker_report(self._memory)

    def pending(self) -> Iterator[ControlFrame]:
        """Remove and yield the queued frames, oldest first. Data thread."""
        while self._frames:
            yield self._frames.popleft()

    def _free_experts(self, experts: ExpertRole, frame: RunGeneration) -> None:
        """Free the expert slots that the new generation's placement does not use."""
        command = self.membership.announced
        if command is not None and command.generation.number == frame.generation:
            experts.keep_only(command.placement)
