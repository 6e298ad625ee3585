"""Laps of a captured step, which the device times in each replay.

The host runs nothing within a CUDA graph, so events on the stream take the place of its clock. Each
event costs a node of the graph, so only the laps of one bank are timed, the one in the middle.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from workers.model.config import BankSpec


class TimedLap(NamedTuple):
    """A lap in the latest replay. Times are nanoseconds after the replay's first event."""

    name: str
    bank: BankSpec
    exchange: int
    micro_batch: int
    begin_ns: int
    end_ns: int


class _Lap(NamedTuple):
    name: str
    bank: BankSpec
    exchange: int
    micro_batch: int
    begin: torch.cuda.Event
    end: torch.cuda.Event


class CapturedLaps:
    """Events of the laps of one bank in a captured step."""

    def __init__(self, num_banks: int) -> None:
        self.num_banks = num_banks
        self._timed = num_banks // 2
        """Index of the bank whose laps are timed."""
        self._last: torch.cuda.Event | None = None
        self._laps: list[_Lap] = []
        self._events: list[torch.cuda.Event] = []
        """All recorded events, which must exist as long as the graph that records them."""

    def mark(self, bank: BankSpec) -> None:
        """Start a lap of a bank, without recording the lap before it."""
        self._last = self._record() if bank.index == self._timed else None

    def lap(self, name: str, bank: BankSpec, exchange: int, micro_batch: int) -> None:
        """End the current lap; see ``StepTimer.lap``."""
        begin = self._last
        if not self._events:
            self._record()  # near the start of the graph
        may_precede = bank.index == self._timed - 1  # a lap of the timed bank
        self._last = self._record() if may_precede or bank.index == self._timed else None
        if bank.index == self._timed and begin is not None and self._last is not None:
            self._laps.append(_Lap(name, bank, exchange, micro_batch, begin, self._last))

    def read(self) -> list[TimedLap]:
        """Return the laps of the latest replay, for which the host has waited."""
        return [
            TimedLap(*lap[:4], self._ns_until(lap.begin), self._ns_until(lap.end))
            for lap in self._laps
        ]

    def _ns_until(self, event: torch.cuda.Event) -> int:
        return int(self._events[0].elapsed_time(event) * 1e6)

    def _record(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True, external=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append(event)
        return event
