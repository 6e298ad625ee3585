"""Orders to workers to load experts, and which of them are not answered yet."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.controller.parts.cluster import Cluster
from cluster.core.frames import LoadExperts
from cluster.planner.stages import SlotFill

CHECKPOINT = -1
"""Stands for the checkpoint among devices that an expert may come from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLoadCommand:
    """An order without an answer yet."""

    worker: str
    fills: tuple[SlotFill, ...]
    epoch: int
    """Placement epoch of the controller at the order; workers with a later one refuse it."""
    began_at: float
    """Monotonic time of the order."""
    source: int
    """Device that the experts come from."""
    tried: frozenset[int]
    """Sources that have failed."""


class ExpertLoadCommands:
    """The orders of one recovery or of one change of the placement."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.pending: dict[int, ExpertLoadCommand] = {}
        """By number."""

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
        """Order a worker to load; ``details`` are for ``LoadExperts.source``."""
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
        """Take an order off the list; None for an unknown one."""
        order = self.pending.get(number)
        if order is None or order.worker != worker:
            return None
        return self.pending.pop(number)

    def drop(self, workers: Collection[str]) -> None:
        """Forget the orders of lost workers."""
        self.pending = {n: o for n, o in self.pending.items() if o.worker not in workers}

    def take_overdue(self, now: float, limit_s: float) -> list[ExpertLoadCommand]:
        """Take the orders off the list that have had no answer for longer than ``limit_s``."""
        late = [n for n, order in self.pending.items() if now - order.began_at > limit_s]
        return [self.pending.pop(number) for number in late]

    def give_up(self) -> None:
        """Have the workers stop what they have not finished, and forget it."""
        for worker in sorted({o.worker for o in self.pending.values()}):
            number = next(self._cluster.order_numbers)
            order = LoadExperts(order=number, experts=[], source={"kind": "give up"})
            self._cluster.send(order, worker)
        self.pending.clear()

    @property
    def is_pending(self) -> bool:
        """Some order is not answered."""
        return bool(self.pending)
