"""Sends workers commands to load experts, and tracks the commands without a reply."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.controller.cluster import Cluster
from cluster.core.frames import LoadExperts
from cluster.planner.stages import SlotFill

CHECKPOINT = -1
"""Value of ``ExpertLoadCommand.source`` for the checkpoint instead of a device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLoadCommand:
    """A command to a worker to load experts, whose reply is pending."""

    worker: str
    fills: tuple[SlotFill, ...]
    epoch: int
    """Placement epoch in force when the command is sent; workers in a later epoch reject it."""
    began_at: float
    """Monotonic time at which the command was sent."""
    source: int
    """Device from which the experts are read; ``CHECKPOINT`` for the checkpoint."""
    tried: frozenset[int]
    """Devices from which these experts could not be read before."""


class ExpertLoadCommands:
    """Sends load commands for one recovery or placement change and tracks their replies."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.pending: dict[int, ExpertLoadCommand] = {}
        """Commands without a reply, by the number of the command."""

    def send(
        self,
        worker: str,
        fills: Sequence[SlotFill],
        now: float,
        *,
        source: int = CHECKPOINT,
        tried: frozenset[int] = frozenset(),
        details: Mapping[str, Any] | None = None,
    ) -> None:
        """Send a load command to a worker; ``details`` are fields of ``LoadExperts.source``."""
        number, epoch = next(self._cluster.order_numbers), self._cluster.placement.epoch
        self.pending[number] = ExpertLoadCommand(
            worker=worker, fills=tuple(fills), epoch=epoch, began_at=now, source=source, tried=tried
        )
        frame = LoadExperts(
            order=number,
            epoch=epoch,
            experts=[[f.bank, f.slot, f.expert] for f in fills],
            source=dict(details or {}),
        )
        self._cluster.send(frame, worker)

    def answered(self, worker: str, number: int) -> ExpertLoadCommand | None:
        """Remove and return the command that ``worker`` has answered; None if it is unknown."""
        order = self.pending.get(number)
        if order is None or order.worker != worker:
            return None
        return self.pending.pop(number)

    def drop(self, workers: Collection[str]) -> None:
        """Forget the commands to ``workers``, which are lost."""
        self.pending = {n: o for n, o in self.pending.items() if o.worker not in workers}

    def take_overdue(self, now: float, limit_s: float) -> list[ExpertLoadCommand]:
        """Remove and return the commands without a reply for more than ``limit_s`` seconds."""
        late = [n for n, order in self.pending.items() if now - order.began_at > limit_s]
        return [self.pending.pop(number) for number in late]

    def give_up(self) -> None:
        """Tell the workers to stop loading for unanswered commands, and forget the commands."""
        for worker in sorted({o.worker for o in self.pending.values()}):
            number = next(self._cluster.order_numbers)
            order = LoadExperts(order=number, experts=[], source={"kind": "give up"})
            self._cluster.send(order, worker)
        self.pending.clear()

    @property
    def is_pending(self) -> bool:
        """Whether any load command has no reply yet."""
        return bool(self.pending)
