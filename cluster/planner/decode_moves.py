"""Plans moves of experts that reduce the load of the busiest device in decode steps.

The planner ``mesh`` plans moves for prompts, whose tokens all copies of an expert share. In decode
steps one copy of each expert serves all rows, so other moves are needed. In this module, each
bank's busiest device gives an expert to another device, which uses a free slot, the slot of a
dispensable copy, or gives a lighter expert in exchange. This repeats while it helps the busiest
device and the budget lasts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from cluster.core.load_profile import LoadProfile
from cluster.core.placement import FREE_SLOT, BankPlacement, ExpertPlacement
from cluster.planner import cost
from cluster.planner.base import PlannedTopology, normalised

_LEAST_GAIN = 0.005
"""Smallest relative reduction of the busiest device's work for which a move is made."""
_EPS = 1e-12


@dataclass(frozen=True, slots=True)
class _ExpertMove:
    """Move of expert ``gives`` from the busiest device to device ``to``, perhaps as a swap.

    In a swap, expert ``takes`` moves the other way.
    """

    peak: float
    """Work, over speed, of the busier of the two devices after the move."""
    gives: int
    to: int
    slot: int
    """Slot of device ``to`` for the expert; -1 if the device has a copy of the expert already."""
    takes: int = FREE_SLOT


def improved(
    profile: LoadProfile,
    topology: PlannedTopology,
    placement: ExpertPlacement,
    *,
    budget: int,
    rows: int,
    slot_tokens: float,
) -> ExpertPlacement:
    """Return ``placement`` with at most ``budget`` slots changed, to balance decode steps.

    The decode steps have ``rows`` rows. ``slot_tokens`` is the cost of reading an expert, in
    computed tokens. Split weights of new copies are zero and must be solved afterwards.
    """
    work = [
        _BankTrades(bank, topology, _work(profile, bank, rows, slot_tokens))
        for bank in placement.banks
    ]
    is_open = [True] * len(work)
    while budget > 0 and any(is_open):
        for index, bank in enumerate(work):
            used = bank.step(budget) if is_open[index] else None
            is_open[index] = used is not None
            budget -= used or 0
    return replace(placement, banks=tuple(bank.result() for bank in work))


def _work(profile: LoadProfile, bank: BankPlacement, rows: int, slot_tokens: float) -> list[float]:
    """Return the expected work of each expert in a decode step, in computed tokens."""
    loads = normalised([profile.counts(bank.bank, bank.layer)])
    active = cost.activation(loads, profile.top_k, rows)[0]
    work: list[float] = (slot_tokens * active + loads[0] * profile.top_k * rows).tolist()
    return work


class _BankTrades:
    """One bank while its busiest devices give experts to other devices."""

    def __init__(
        self, bank: BankPlacement, topology: PlannedTopology, work: Sequence[float]
    ) -> None:
        self._bank = bank
        self._work = work
        self._rows = [list(row) for row in bank.physical_to_logical]
        capacities = topology.capacities(bank.num_experts)
        for row, capacity in zip(self._rows, capacities.tolist(), strict=True):
            row += [FREE_SLOT] * (capacity - len(row))
        self._primary = list(bank.decode_device)
        self._copies = Counter(e for row in self._rows for e in row if e != FREE_SLOT)
        self._least = max(1, min(2, *self._copies.values()))
        speeds = topology.speeds(bank.num_experts)
        self._speed = (speeds * np.count_nonzero(speeds)).tolist()

    def step(self, budget: int) -> int | None:
        """Make the best trade of the busiest device within ``budget`` slots.

        Returns the number of changed slots; None if no trade helps enough.
        """
        utilization = [self._utilization(device) for device in range(len(self._rows))]
        busiest = max(range(len(utilization)), key=lambda d: utilization[d])
        trades = (t for t in self._trades(busiest, utilization) if self._cost(t) <= budget)
        best = min(trades, key=lambda t: (t.peak, t.to, t.gives, t.takes), default=None)
        if best is None or best.peak > utilization[busiest] * (1.0 - _LEAST_GAIN):
            return None
        used = self._cost(best)
        self._apply(best, busiest)
        return used

    def result(self) -> BankPlacement:
        """Return the placement of the bank after all trades so far."""
        return replace(self._bank.with_slots(self._rows), decode_device=tuple(self._primary))

    def _utilization(self, device: int, change: float = 0.0) -> float:
        own = sum(self._work[e] for e, primary in enumerate(self._primary) if primary == device)
        return (own + change) / self._speed[device] if self._speed[device] > _EPS else 0.0

    def _trades(self, busiest: int, utilization: Sequence[float]) -> Iterator[_ExpertMove]:
        gives = [e for e, primary in enumerate(self._primary) if primary == busiest]
        for to in range(len(self._rows)):
            if to == busiest or self._speed[to] <= _EPS or utilization[to] >= utilization[busiest]:
                continue
            room = self._room(to)
            for expert in gives:
                work = self._work[expert]
                slot = -1 if expert in self._rows[to] else room
                if slot is not None:
                    peak = max(self._utilization(busiest, -work), self._utilization(to, work))
                    yield _ExpertMove(peak, expert, to, slot)
                if slot != -1:
                    yield from self._swaps(busiest, to, expert)

    def _swaps(self, busiest: int, to: int, expert: int) -> Iterator[_ExpertMove]:
        """Yield swaps of ``expert`` for a lighter primary copy on device ``to``."""
        for slot, other in enumerate(self._rows[to]):
            less = self._work[expert] - self._work[other]
            if other == FREE_SLOT or self._primary[other] != to or less <= 0:
                continue
            if other not in self._rows[busiest]:
                peak = max(self._utilization(busiest, -less), self._utilization(to, less))
                yield _ExpertMove(peak, expert, to, slot, other)

    def _room(self, device: int) -> int | None:
        """Return a free slot of a device, or the slot of its most dispensable copy; else None."""
        row = self._rows[device]
        if FREE_SLOT in row:
            return row.index(FREE_SLOT)
        spare = [
            (self._work[e], s)
            for s, e in enumerate(row)
            if self._copies[e] > self._least and self._primary[e] != device
        ]
        return min(spare)[1] if spare else None

    def _cost(self, trade: _ExpertMove) -> int:
        return 0 if trade.slot == -1 else 1 if trade.takes == FREE_SLOT else 2

    def _apply(self, trade: _ExpertMove, busiest: int) -> None:
        self._primary[trade.gives] = trade.to
        if trade.slot == -1:
            return
        self._copies[self._rows[trade.to][trade.slot]] -= 1
        self._copies[trade.gives] += 1
        self._rows[trade.to][trade.slot] = trade.gives
        if trade.takes != FREE_SLOT:
            self._rows[busiest][self._rows[busiest].index(trade.gives)] = trade.takes
            self._copies[trade.gives] -= 1
            self._copies[trade.takes] += 1
            self._primary[trade.takes] = busiest
