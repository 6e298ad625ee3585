"""Load orders under way: which worker loads which experts, and the answers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from cluster.core.frames import LoadExperts
from cluster.planner.stages import SlotFill


@dataclass(frozen=True, kw_only=True, slots=True)
class Reload:
    """An order without an answer yet."""

    order: int
    worker: str
    loads: tuple[SlotFill, ...]
    began_at: float
    """Monotonic time of the order."""


class Reloads:
    """One controller's orders."""

    def __init__(self, first_order: int) -> None:
        """Orders are numbered from ``first_order``, which tells apart answers to other orders."""
        self._numbers = count(first_order)
        self._pending: dict[int, Reload] = {}

    def order(
        self, loads: Sequence[SlotFill], workers: Mapping[int, str], epoch: int, now: float
    ) -> dict[str, LoadExperts]:
        """New orders by worker, for the placement ``epoch``; ``workers`` is device -> worker."""
        by_worker: defaultdict[str, list[SlotFill]] = defaultdict(list)
        for load in loads:
            by_worker[workers[load.device]].append(load)
        orders = {}
        for worker, own in by_worker.items():
            number = next(self._numbers)
            self._pending[number] = Reload(
                order=number, worker=worker, loads=tuple(own), began_at=now
            )
            experts = [[load.bank, load.slot, load.expert] for load in own]
            orders[worker] = LoadExperts(order=number, epoch=epoch, experts=experts)
        return orders

    def answered(self, worker: str, order: int) -> Reload | None:
        """Take an order off the list; None for an unknown one."""
        reload = self._pending.get(order)
        if reload is None or reload.worker != worker:
            return None
        return self._pending.pop(order)

    def drop(self, worker: str) -> None:
        """Forget the orders of a lost worker."""
        self._pending = {n: r for n, r in self._pending.items() if r.worker != worker}

    def overdue(self, now: float, limit_s: float) -> list[Reload]:
        """Orders without an answer for longer than ``limit_s``."""
        return [r for r in self._pending.values() if now - r.began_at > limit_s]

    @property
    def is_pending(self) -> bool:
        """Some order is not answered."""
        return bool(self._pending)
