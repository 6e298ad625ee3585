"""A worker's membership: its generation, the maps, and whether steps run.

    NewGeneration ─▶ edges open, maps taken ─▶ GenerationReady
        ─▶ RunGeneration ─▶ steps; epochs follow one another
        ─▶ a peer is lost, the lease runs out, or the next generation is announced

The data thread does all of this; the control thread reports the state to a controller.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

from cluster.core.errors import GenerationChangedError, PeerLostError, ProtocolError
from cluster.core.frames import (
    ControlFrame,
    EpochReady,
    EpochSwitched,
    GenerationReady,
    NewEpoch,
    NewGeneration,
    PeerLost,
    RunGeneration,
    SwitchEpoch,
    WorkerReport,
)
from cluster.core.placement import ExpertPlacement
from cluster.core.topology import Generation
from workers.engine.isolation import StepMembers
from workers.engine.step_channel import StepChannel
from workers.process.epochs import EpochPlacements
from workers.requests.step_header import StepHeader
from workers.transport.peer_connections import PeerConnections
from workers.transport.transport import DataTransport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class MembershipHooks:
    """Actions of the worker; all but ``send`` run on the data thread."""

    send: Callable[[ControlFrame], None]
    """Send to the controller."""
    enter: Callable[[Generation, ExpertPlacement], None]
    """Take the maps of a generation whose edges are open."""
    lose_members: Callable[[Set[str]], None]
    """Members of the last generation died; the last step was given up."""
    begin_steps: Callable[[], None]
    """A generation runs."""


class Membership:
    """See the module. ``join`` comes before the first frame."""

    def __init__(self, name: str, hooks: MembershipHooks) -> None:
        self.generation = Generation(number=0, members=())
        """Newest generation that this worker has taken."""
        self.announced: NewGeneration | None = None
        """Newest announced generation; set by the control thread."""
        self.epochs = EpochPlacements()
        self.runs = False
        self.is_fenced = False
        """The lease ran out in this generation; set by the control thread."""
        self.last_commit = time.monotonic()
        """Monotonic time of the last committed step."""
        self._name = name
        self._hooks = hooks
        self._loss: PeerLost | None = None
        self._step_members = StepMembers()

    def join(
        self, connections: PeerConnections, channel: StepChannel, transport: DataTransport
    ) -> None:
        """The data plane is open."""
        self._connections = connections
        self._channel = channel
        self._transport = transport

    # ---- the control thread -----------------------------------------------------------------

    def worker_report(self, term: int, memory: dict[str, Any]) -> list[ControlFrame]:
        """State of this worker, for a restarted controller.

        ``term`` is the term of the previous controller, ``memory`` is the snapshot that it left.
        """
        order, loss = self.announced, self._loss
        number = self.generation.number
        here = order is not None and order.generation.number == number
        placement = order.placement if order is not None else None
        if here and placement is not None and self.epochs.current.epoch > placement.epoch:
            placement = self.epochs.current  # a step header has switched to it since
        report = WorkerReport(
            term=term,
            generation=order.generation if order is not None else None,
            placement=placement,
            running=here and self.runs and not self.is_fenced,
            highest_step=self._channel.highest_step if number else 0,
            highest_epoch=max(self._channel.highest_epoch, self.epochs.current.epoch)
            if number
            else 0,
            memory=memory,
        )
        return [report] if loss is None else [report, loss]

    # ---- the data thread --------------------------------------------------------------------

    def handle(self, frame: ControlFrame) -> None:
        """Handle frames about generations and epochs; others are ignored."""
        match frame:
            case NewGeneration():
                self._take_generation(frame)
            case RunGeneration():
                self._run_generation(frame)
            case NewEpoch():
                self._learn_epoch(frame)
            case SwitchEpoch():
                self._switch_epoch(frame)

    def follow_epoch(self, header: StepHeader, stall_s: float = 0.0) -> None:
        """Note the epoch of a step; the leader reports a new one to the controller.

        ``stall_s`` is the time for which work has waited for this header.
        """
        if self.epochs.reach(header.epoch) and self._channel.is_leader:
            self._hooks.send(
                EpochSwitched(
                    generation=header.generation,
                    epoch=header.epoch,
                    step=header.step,
                    stall_s=stall_s,
                )
            )

    def lose(self, err: PeerLostError) -> None:
        """Stop the steps and report the lost peer to the controller, which decides what follows."""
        self.runs = False
        number = self.generation.number
        logger.warning("%s: generation %d stops: %s", self._name, number, err)
        self._loss = PeerLost(worker=err.peer, generation=number, reason=err.reason)
        self._hooks.send(self._loss)

    def _take_generation(self, frame: NewGeneration) -> None:
        """Abandon the step under way, open the edges of the new generation, report readiness."""
        generation = frame.generation
        if generation.number <= self.generation.number:
            return
        self.runs, self._loss = False, None
        if dead := self._step_members.died(generation, frame.drained):
            self._hooks.lose_members(dead)
        self.generation = generation
        try:
            self._connections.apply_generation(generation)
            self._transport.apply_generation(generation)
            self._hooks.enter(generation, frame.placement)
        except GenerationChangedError:
            return
        except PeerLostError as err:
            self.lose(err)
            return
        self.epochs.start(frame.placement)
        self._hooks.send(
            GenerationReady(
                generation=generation.number,
                highest_step=self._channel.highest_step,
                highest_epoch=max(self._channel.highest_epoch, frame.placement.epoch),
            )
        )

    def _run_generation(self, frame: RunGeneration) -> None:
        if frame.generation == self.generation.number:
            self._channel.start_generation(frame.first_step, self.epochs.current.epoch)
            self.last_commit = time.monotonic()
            self.is_fenced = False
            self._step_members.run(self.generation)
            self._hooks.begin_steps()
            self.runs = True

    def _learn_epoch(self, frame: NewEpoch) -> None:
        """Prepare the maps of an epoch that may follow."""
        if frame.generation != self.generation.number:
            return
        error = ""
        try:
            self._hooks.enter(self.generation, self.epochs.learn(frame))
        except ProtocolError as err:
            error = str(err)
        ready = EpochReady(generation=frame.generation, epoch=frame.epoch, error=error)
        self._hooks.send(ready)

    def _switch_epoch(self, frame: SwitchEpoch) -> None:
        """Leader: name the epoch in the next header, which is sent when all ranks have proposed."""
        if frame.generation == self.generation.number and self.runs:
            self._channel.set_epoch(frame.epoch, frame.oldest_epoch)
