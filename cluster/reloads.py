"""Load orders under way: who was told to load which experts, and what came of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from cluster.control_frames import LoadExperts
from cluster.coverage import ExpertLoad


@dataclass(frozen=True, kw_only=True, slots=True)
class Reload:
    """One order that is not answered yet."""

    order: int
    """Its number."""
    worker: str
    """Who loads."""
    loads: tuple[ExpertLoad, ...]
    """What it loads."""
    began_at: float
    """Monotonic time of the order."""


class Reloads:
    """The orders of one controller. Owned by it."""

    def __init__(self, first_order: int = 1) -> None:
        """Orders are numbered from ``first_order``, so that nobody else's answers are ours."""
        self._numbers = count(first_order)
        self._pending: dict[int, Reload] = {}

    def order(
        self, loads: Sequence[ExpertLoad], workers: Mapping[int, str], now: float
    ) -> dict[str, LoadExperts]:
        """New orders by worker; ``workers`` is device -> worker."""
        by_worker: defaultdict[str, list[ExpertLoad]] = defaultdict(list)
        for load in loads:
            by_worker[workers[load.device]].append(load)
        orders = {}
        for worker, own in by_worker.items():
            number = next(self._numbers)
            self._pending[number] = Reload(
                order=number, worker=worker, loads=tuple(own), began_at=now
            )
            experts = [[load.bank, load.slot, load.expert] for load in own]
            orders[worker] = LoadExperts(order=number, experts=experts)
        return orders

    def answered(self, worker: str, order: int) -> Reload | None:
        """Take an order off the list; None for one that is not on it."""
        reload = self._pending.get(order)
        if reload is None or reload.worker != worker:
            return None
        return self._pending.pop(order)

    def drop(self, worker: str) -> None:
        """Forget the orders of a worker that is lost."""
        self._pending = {n: r for n, r in self._pending.items() if r.worker != worker}

    def overdue(self, now: float, limit_s: float) -> list[Reload]:
        """Orders without an answer for longer than ``limit_s``."""
        return [r for r in self._pending.values() if now - r.began_at > limit_s]

    @property
    def is_pending(self) -> bool:
        """Some order is not answered."""
        return bool(self._pending)
