"""Measures how many rows an attention rank must send to each expert rank.

With more expert ranks than experts per row, most rows need only some of the ranks. But both sides
must know the size of a message beforehand, and the host would have to wait for the device to learn
which rows a rank needs. So the header of each step fixes the number of rows on an edge (connection
to an expert rank), from the need in recent steps, and the needed rows are sent first. If they do
not fit, the step is discarded before its commit and runs again with all rows of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from workers.model.host_copies import to_host_later
from workers.requests.step_header import ALL_ROWS

_DECAY = 1 / 128
"""Fraction by which ``EdgeRows.share`` decreases in each step: a peak has an effect for some
seconds."""
_MIN_ROWS = 16
"""Minimum rows of a dispatch from which ``EdgeRows.share`` is measured."""


class _Noted(NamedTuple):
    """Row counts of one dispatch: rows that an expert rank needed, all rows, and sent rows."""

    needed: Tensor
    """Number of rows that the busiest expert rank needed: a scalar int64 tensor on the device."""
    num_rows: int
    num_sent: int


NeededRows = Sequence[_Noted]
"""Row counts of the dispatches of a captured step. Each replay refills their tensors."""


class EdgeRows:
    """Measures how many of one attention rank's rows its expert ranks need. Data thread only."""

    def __init__(self) -> None:
        self.can_limit = False
        """Whether edges of the current generation may carry only a part of this rank's rows."""
        self._share = 0.0
        self._num_forgotten = 0
        """Number of calls of ``forget``: steps that began before the last one are not measured."""
        self._has_rows = True
        self._noted: list[_Noted] = []
        self._found: Tensor | None = None

    @property
    def share(self) -> int:
        """Value for ``StepProposal.edge_share`` if ``can_limit``: in thousandths, the largest share
        of this rank's rows that one expert rank needed in recent steps; 0 if unknown."""
        return math.ceil(self._share * ALL_ROWS)

    def forget(self) -> None:
        """Reset ``share`` to unknown, after experts have moved or needed rows did not fit."""
        self._share = 0.0
        self._num_forgotten += 1

    def begin_step(self, has_rows: bool = True) -> None:
        """Begin a step: drop the noted row counts of a failed earlier step.

        ``has_rows``: whether the rank has rows. If not, it sends only padding, which is not noted.
        """
        self._noted, self._found, self._has_rows = [], None, has_rows

    def note(self, is_needed: Tensor, num_rows: int, num_sent: int) -> None:
        """Note the row counts of a dispatch.

        is_needed [ranks, T] bool: whether the expert rank has an expert of the row. num_rows: T, or
        the bucket (number of rows after padding). num_sent: number of rows sent to each rank.
        """
        if self._has_rows and (num_rows >= _MIN_ROWS or num_sent < num_rows):
            self._noted.append(_Noted(is_needed.sum(1).max(), num_rows, num_sent))

    def take_noted(self) -> NeededRows:
        """Remove and return the noted row counts of a captured step."""
        found = tuple(self._noted)
        self.begin_step()
        return found

    def put_noted(self, needed: NeededRows) -> None:
        """Set the row counts of a replayed step, which ``take_noted`` returned at its capture."""
        self._noted = list(needed) if self._has_rows else []

    def finish_step(self) -> None:
        """Start to copy the noted row counts to the host for ``end_step``.

        Call it again if further dispatches follow.
        """
        if self._noted and (self._found is None or len(self._found) < len(self._noted)):
            self._found = to_host_later(torch.stack([noted.needed for noted in self._noted]))

    def end_step(self) -> bool:
        """Return whether all needed rows were sent, and update ``share``.

        Call it after ``finish_step``, once the host has waited for the device.
        """
        return self.end_later()()

    def end_later(self) -> Callable[[], bool]:
        """Return a function that does the work of ``end_step`` for this step. The next step may
        have begun before the function is called."""
        found, all_noted = self._found, self._noted
        self._noted, self._found = [], None
        return partial(self._end, found, all_noted, self._num_forgotten)

    def _end(self, found: Tensor | None, all_noted: NeededRows, num_forgotten: int) -> bool:
        if found is None:
            return True
        is_complete, share = True, self._share * (1 - _DECAY)
        for most, noted in zip(found.tolist(), all_noted, strict=True):
            is_complete &= most <= noted.num_sent
            if noted.num_rows >= _MIN_ROWS:
                share = max(share, most / noted.num_rows)
        if num_forgotten == self._num_forgotten:
            self._share = share
        if not is_complete:
            self.forget()
        return is_complete
