"""A worker's membership: its generation, its placement maps, and whether steps run.

    NewGeneration ─▶ edges open, maps applied ─▶ GenerationReady
        ─▶ RunGeneration ─▶ steps; epochs follow one another
        ─▶ a peer is lost, the lease expires, or the next generation is announced

The data thread makes these transitions. The control thread reports the state to a controller and
raises the fence: the number of the newest generation that the worker must not run. The fence only
grows, and a generation runs only if its number is above it, so the two threads need no lock.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from enum import Enum
from typing import Any

from cluster.core.errors import GenerationChangedError, PeerLostError, ProtocolError
from cluster.core.frames import (
    ControlFrame,
    ControllerSnapshot,
    EpochReady,
    EpochSwitched,
    GenerationReady,
    NewEpoch,
    NewGeneration,
    PeerLost,
    RunGeneration,
    SlotContents,
    SwitchEpoch,
    WorkerReport,
)
from cluster.core.placement import ExpertPlacement
from cluster.core.states import next_state
from cluster.core.topology import Generation
from workers.engine.group_channels import GroupChannels
from workers.engine.isolation import StepMembers
from workers.engine.step_channel import StepChannel
from workers.experts.transfer.loading import Obstacle, SlotOrder
from workers.process.control.epochs import EpochPlacements
from workers.requests.step_header import StepHeader
from workers.transport.peer_connections import PeerConnections
from workers.transport.transport import DataTransport

logger = logging.getLogger(__name__)


class MembershipState(Enum):
    """State of a worker in its newest generation. The values are texts for logs and status."""

    OUTSIDE = "outside"
    """No steps run: before the first generation, after a loss, or below the fence."""
    OPENING = "opens its edges"
    READY = "ready"
    """``GenerationReady`` has been sent."""
    RUNNING = "runs"


_NEXT = {
    MembershipState.OUTSIDE: {MembershipState.OPENING, MembershipState.OUTSIDE},
    MembershipState.OPENING: {MembershipState.READY, MembershipState.OUTSIDE},
    MembershipState.READY: {
        MembershipState.RUNNING,
        MembershipState.OPENING,
        MembershipState.OUTSIDE,
    },
    MembershipState.RUNNING: {MembershipState.OPENING, MembershipState.OUTSIDE},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MembershipHooks:
    """Callbacks to the worker; all except ``send`` and ``slots`` run on the data thread."""

    send: Callable[[ControlFrame], None]
    """Sends a frame to the controller."""
    enter: Callable[[Generation, ExpertPlacement], None]
    """Applies the placement of a new generation with open connections, or of an announced epoch."""
    lose_members: Callable[[Set[str]], None]
    """Called with the dead members of the last generation, after its last step was abandoned."""
    begin_steps: Callable[[], None]
    """Called when the steps of a generation start."""
    slots: Callable[[], SlotContents] = tuple
    """Returns the contents of the expert slots. Any thread may call it."""


class Membership:
    """Follows the controller's commands about generations and epochs, for one worker."""

    def __init__(self, name: str, hooks: MembershipHooks) -> None:
        self.generation = Generation(number=0, members=())
        """Newest generation that this worker has entered."""
        self.announced: NewGeneration | None = None
        """Newest ``NewGeneration`` command, None before the first; set by the control thread."""
        self.places: tuple[str, ...] = ()
        """Places of the cluster in the controller's last message; set by the control thread."""
        self.epochs = EpochPlacements()
        self.state = MembershipState.OUTSIDE
        """State in the newest generation; only the data thread writes it."""
        self.fence = -1
        """Number of the newest generation that must not run, as the lease expired in it. Only the
        control thread writes it, and it never decreases."""
        self._group_epochs: dict[int, int] = {}
        """Newest epoch of each step group that runs steps on this worker."""
        self._known_epoch = 0
        self._switch: SwitchEpoch | None = None
        self.last_commit = time.monotonic()
        """Monotonic time of the last committed step."""
        self.last_shared_commit = self.last_commit
        """Time of the last committed step that other workers took part in; it renews the lease."""
        self._name = name
        self._hooks = hooks
        self._reported_loss: PeerLost | None = None
        self._step_members = StepMembers()

    def set_data_plane(
        self,
        connections: PeerConnections,
        channel: StepChannel | GroupChannels,
        transport: DataTransport,
    ) -> None:
        """Set the open connections, step channel and transport. Call it before ``handle``."""
        self._connections = connections
        self._channel = channel
        self._transport = transport

    @property
    def is_fenced(self) -> bool:
        """Whether the lease expired in this generation or later."""
        return self.generation.number <= self.fence

    @property
    def is_running(self) -> bool:
        """Whether steps of the newest generation run."""
        return self.state is MembershipState.RUNNING and not self.is_fenced

    @property
    def is_member(self) -> bool:
        """Whether the worker belongs to a generation, even if the next one is being formed."""
        return self.generation.number > 0 and not self.is_fenced

    # ---- the control thread -----------------------------------------------------------------

    def record_command(self, frame: ControlFrame) -> None:
        """Record the newest generation, epoch and places that a command of the controller has."""
        match frame:
            case ControllerSnapshot():
                self.places = frame.places
            case NewGeneration():
                self.announced, self.places = frame, frame.places
                self._known_epoch = max(self._known_epoch, frame.placement.epoch)
            case NewEpoch():
                self._known_epoch = max(self._known_epoch, frame.epoch)
            case SwitchEpoch():
                self._switch = frame

    def raise_fence(self) -> int:
        """Fence all known generations after the lease expired; returns the fence."""
        command = self.announced
        announced = command.generation.number if command is not None else 0
        self.fence = max(self.fence, self.generation.number, announced)
        return self.fence

    def worker_report(self, memory: dict[str, Any]) -> list[ControlFrame]:
        """Return the frames with this worker's state that a restarted controller needs.

        The new controller does not know of a ``SwitchEpoch`` command of the previous one. So a
        leader that has not carried it out yet reports that it is not running. ``memory``: the
        snapshot of the previous controller.
        """
        command, loss = self.announced, self._reported_loss
        number = self.generation.number
        here = command is not None and command.generation.number == number
        placement = command.placement if command is not None else None
        if here and placement is not None and self.epochs.current.epoch > placement.epoch:
            placement = self.epochs.current  # a step header has switched to it since
        switch = self._switch
        will_switch = switch is not None and (
            switch.generation == number and switch.epoch > self.epochs.current.epoch
        )
        report = WorkerReport(
            generation=command.generation if command is not None else None,
            placement=placement,
            running=here and self.is_running and not will_switch,
            highest_step=self._channel.highest_step if number else 0,
            highest_epoch=max(self._channel.highest_epoch, self.epochs.current.epoch)
            if number
            else 0,
            known_epoch=self._known_epoch,
            memory=memory,
            slots=self._hooks.slots(),
        )
        return [report] if loss is None else [report, loss]

    # ---- the loader's thread ------------------------------------------------------------------

    def obstacle(self, device: int, orders: Iterable[SlotOrder], epoch: int) -> Obstacle | None:
        """Call ``EpochPlacements.obstacle`` with the newest announced epoch."""
        command = self.announced
        announced = command.placement.epoch if command is not None else 0
        return self.epochs.obstacle(device, orders, epoch, announced)

    # ---- the data thread --------------------------------------------------------------------

    def handle(self, frame: ControlFrame) -> None:
        """Handle a frame about a generation or an epoch; ignore other frames."""
        match frame:
            case NewGeneration():
                self._take_generation(frame)
            case RunGeneration():
                self._run_generation(frame)
            case NewEpoch():
                self._prepare_epoch(frame)
            case SwitchEpoch():
                self._switch_epoch(frame)

    def follow_epoch(self, header: StepHeader, stall_s: float = 0.0, group: int = 0) -> None:
        """Record the epoch of a step; the leader reports a new one to the controller.

        ``stall_s``: seconds that pending work has waited for this step's header. ``group``: step
        group of the step, on an expert worker; its epoch is current until all groups run a later
        one.
        """
        self._group_epochs[group] = header.epoch
        epoch = min(self._group_epochs.values())
        if self.epochs.switch_to(epoch) and self._channel.is_leader:
            self._hooks.send(
                EpochSwitched(
                    generation=header.generation,
                    epoch=header.epoch,
                    step=header.step,
                    stall_s=stall_s,
                )
            )

    def record_commit(self, *, is_shared: bool) -> None:
        """Record a commit or the start of steps. ``is_shared``: other workers took part in it."""
        self.last_commit = time.monotonic()
        if is_shared:
            self.confirm_commit()

    def confirm_commit(self) -> None:
        """Count the last commit as shared: the hosts of all peers have received its header."""
        self.last_shared_commit = self.last_commit

    def report_lost_peer(self, err: PeerLostError) -> None:
        """Stop the steps and report the lost peer to the controller, which decides what follows."""
        self._set_state(MembershipState.OUTSIDE)
        number = self.generation.number
        logger.warning("%s: generation %d stops: %s", self._name, number, err)
        self._reported_loss = PeerLost(
            worker=err.peer, generation=number, reason=err.reason, is_late=err.is_late
        )
        self._hooks.send(self._reported_loss)

    def stop_steps(self) -> None:
        """Stop the steps, because a new generation is announced or the fence was raised."""
        self._set_state(MembershipState.OUTSIDE)

    def _set_state(self, state: MembershipState) -> None:
        self.state = next_state(self.state, state, _NEXT)

    def _take_generation(self, frame: NewGeneration) -> None:
        """Abandon the running step, open the edges of the new generation, report readiness."""
        generation = frame.generation
        if generation.number <= self.generation.number:
            return
        self._set_state(MembershipState.OPENING)
        self._reported_loss = None
        if dead := self._step_members.take_dead(generation, frame.drained):
            self._hooks.lose_members(dead)
        self.generation = generation
        try:
            self._connections.apply_generation(generation)
            self._transport.apply_generation(generation)
            self._hooks.enter(generation, frame.placement)
        except GenerationChangedError:
            self.stop_steps()
            return
        except PeerLostError as err:
            self.report_lost_peer(err)
            return
        self.epochs.start(frame.placement)
        self._set_state(MembershipState.READY)
        self._hooks.send(
            GenerationReady(
                generation=generation.number,
                highest_step=self._channel.highest_step,
                highest_epoch=max(self._channel.highest_epoch, frame.placement.epoch),
                slots=self._hooks.slots(),
            )
        )

    def _run_generation(self, frame: RunGeneration) -> None:
        if frame.generation != self.generation.number or self.state is not MembershipState.READY:
            return
        if self.is_fenced:
            logger.warning("%s may no longer run generation %d", self._name, frame.generation)
            self.stop_steps()
        elif lacking := self._num_missing_experts():
            logger.error(
                "%s does not run generation %d: %d of its experts are not in their slots",
                *(self._name, frame.generation, lacking),
            )
            self.stop_steps()  # heartbeats report it, and the controller forms the next one
        else:
            epoch = self.epochs.current.epoch
            self._channel.start_generation(frame.first_step, epoch)
            has_attention = any(m.name == self._name for m in self.generation.attention)
            groups = range(1 if has_attention else len(self.generation.groups))
            self._group_epochs = dict.fromkeys(groups, epoch)
            self.record_commit(is_shared=True)
            self._step_members.begin_generation(self.generation, self._name)
            self._hooks.begin_steps()
            self._set_state(MembershipState.RUNNING)

    def _num_missing_experts(self) -> int:
        """Number of experts in the current maps that are missing from this worker's slots."""
        own = next((m for m in self.generation.experts if m.name == self._name), None)
        if own is None:
            return 0
        return len(list(self.epochs.current.missing(own.device, self._hooks.slots())))

    def _prepare_epoch(self, frame: NewEpoch) -> None:
        """Prepare the maps of an announced epoch."""
        if frame.generation != self.generation.number:
            return
        error = ""
        try:
            self._hooks.enter(self.generation, self.epochs.add_announced(frame))
        except ProtocolError as err:
            error = str(err)
        ready = EpochReady(generation=frame.generation, epoch=frame.epoch, error=error)
        self._hooks.send(ready)

    def _switch_epoch(self, frame: SwitchEpoch) -> None:
        """On the leader: put the epoch into the next header, sent once all ranks have proposed."""
        if frame.generation == self.generation.number and self.is_running:
            self._channel.set_epoch(frame.epoch, frame.oldest_epoch)
