"""A worker's place in the cluster: the generation that it is in, its maps, whether it runs steps.

    NewGeneration ─▶ edges open, maps taken ─▶ GenerationReady
        ─▶ RunGeneration ─▶ steps; epochs follow one another
        ─▶ a peer is lost, the lease runs out, or the next generation is announced

The data thread does all of this; the control thread tells a controller where the worker stands.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

from cluster.control_frames import (
    ControlFrame,
    EpochReady,
    EpochSwitched,
    GenerationReady,
    NewEpoch,
    NewGeneration,
    PeerLost,
    Rejoin,
    RunGeneration,
    SwitchEpoch,
)
from cluster.errors import GenerationChangedError, PeerLostError, ProtocolError
from cluster.placement import ExpertPlacement
from cluster.topology import Generation
from workers.dist.header import StepHeader
from workers.dist.hub import PeerHub
from workers.dist.step_channel import StepChannel
from workers.dist.transport import DataTransport
from workers.epochs import EpochMaps
from workers.isolation import Companions

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class MembershipHooks:
    """What the worker itself does on the way; all but ``send`` on the data thread."""

    send: Callable[[ControlFrame], None]
    """Send to the controller."""
    enter: Callable[[Generation, ExpertPlacement], None]
    """Take a generation whose edges are open, and its maps."""
    lose_members: Callable[[Set[str]], None]
    """Workers with which it has run steps died; the last step was given up."""
    begin_steps: Callable[[], None]
    """A generation runs."""


class Membership:
    """See the module. ``join`` comes before the first frame."""

    def __init__(self, name: str, hooks: MembershipHooks) -> None:
        """``name`` is the worker's."""
        self.generation = Generation(number=0, members=())
        """Newest generation that this worker has taken."""
        self.announced: NewGeneration | None = None
        """Newest generation that was announced; the control thread writes it."""
        self.epochs = EpochMaps()
        """Placements of the generation."""
        self.runs = False
        """Steps of the generation run."""
        self.is_fenced = False
        """The lease ran out in this generation; the control thread sets it."""
        self.last_commit = time.monotonic()
        """Monotonic time of the last committed step."""
        self._name = name
        self._hooks = hooks
        self._loss: PeerLost | None = None
        self._companions = Companions()

    def join(self, hub: PeerHub, channel: StepChannel, transport: DataTransport) -> None:
        """The data plane is open."""
        self._hub = hub
        self._channel = channel
        self._transport = transport

    # ---- the control thread -----------------------------------------------------------------

    def standing(self, term: int, memory: dict[str, Any]) -> list[ControlFrame]:
        """Where this worker stands, for a controller that knows nothing of it.

        ``term`` is that of the controller before; ``memory`` is what that one gave to keep.
        """
        order, loss = self.announced, self._loss
        number = self.generation.number
        here = order is not None and order.generation["number"] == number
        placement = order.placement if order is not None else {}
        if here and self.epochs.current.epoch > placement["epoch"]:
            placement = self.epochs.current.to_dict()  # a step header has switched to it since
        standing = Rejoin(
            term=term,
            generation=order.generation if order is not None else {},
            placement=placement,
            running=here and self.runs and not self.is_fenced,
            highest_step=self._channel.highest_step if number else 0,
            highest_epoch=max(self._channel.highest_epoch, self.epochs.current.epoch)
            if number
            else 0,
            memory=memory,
        )
        return [standing] if loss is None else [standing, loss]

    # ---- the data thread --------------------------------------------------------------------

    def handle(self, frame: ControlFrame) -> None:
        """Do what the controller says of generations and epochs; other frames mean nothing here."""
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
        """Note the epoch of a step; the leader tells the controller of a new one.

        ``stall_s``: how long work has waited for this header.
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
        """Run no further step, and tell the controller; it decides what comes next."""
        self.runs = False
        number = self.generation.number
        logger.warning("%s: generation %d stops: %s", self._name, number, err)
        self._loss = PeerLost(worker=err.peer, generation=number, reason=err.reason)
        self._hooks.send(self._loss)

    def _take_generation(self, frame: NewGeneration) -> None:
        """Abandon the old generation's step, open the new one's edges, say that we are ready."""
        generation = Generation.from_dict(frame.generation)
        if generation.number <= self.generation.number:
            return
        self.runs, self._loss = False, None
        placement = ExpertPlacement.from_dict(frame.placement)
        if dead := self._companions.died(generation, frame.drained):
            self._hooks.lose_members(dead)
        self.generation = generation
        try:
            self._hub.apply_generation(generation)
            self._transport.apply_generation(generation)
            self._hooks.enter(generation, placement)
        except GenerationChangedError:
            return
        except PeerLostError as err:
            self.lose(err)
            return
        self.epochs.start(placement)
        self._hooks.send(
            GenerationReady(
                generation=generation.number,
                highest_step=self._channel.highest_step,
                highest_epoch=max(self._channel.highest_epoch, placement.epoch),
            )
        )

    def _run_generation(self, frame: RunGeneration) -> None:
        if frame.generation == self.generation.number:
            self._channel.start_generation(frame.first_step, self.epochs.current.epoch)
            self.last_commit = time.monotonic()
            self.is_fenced = False
            self._companions.run(self.generation)
            self._hooks.begin_steps()
            self.runs = True

    def _learn_epoch(self, frame: NewEpoch) -> None:
        """Get ready for maps that may come into force."""
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
        """Leader: the next header names the epoch; that goes out when all have proposed."""
        if frame.generation == self.generation.number and self.runs:
            self._channel.set_epoch(frame.epoch, frame.oldest_epoch)
