"""Measures how many rows an attention rank must send to each expert rank.

With more expert ranks than experts per row, most rows need only some of the ranks. But both sides
must know the size of a message beforehand, and the host would have to wait for the device to learn
which rows a rank needs. So each step fixes the number of rows on an edge, from the recent need, and
sends the needed rows first. If they do not fit, the step is discarded before its commit and runs
again with all rows of this rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workers.model.host_copies import to_host_later
from workers.requests.step_header import ALL_ROWS

_DECAY = 1 / 128
"""Fraction by which the share decreases in each step: a peak has an effect for some seconds."""
_MIN_ROWS = 16
"""Minimum number of rows for a limit. Smaller dispatches send all rows and are not measured."""


class _Noted(NamedTuple):
    """Row counts of one dispatch."""

    needed: Tensor
    """[] int64: number of rows needed by the expert rank that needed most."""
    num_rows: int
    num_sent: int


NeededRows = Sequence[_Noted]
"""Noted row counts of a captured step. Each replay refills the tensors."""


class EdgeRows:
    """Measures the rows that the edges of one attention rank need. Data thread only."""

    def __init__(self) -> None:
        self.can_limit = False
        """Whether edges of this generation may carry fewer rows than the rank has."""
        self._share = 0.0
        self._noted: list[_Noted] = []
        self._found: Tensor | None = None

    @property
    def share(self) -> int:
        """Value for ``StepProposal.edge_share`` if edges can be limited."""
        return math.ceil(self._share * ALL_ROWS)

    def forget(self) -> None:
        """Reset the share after experts have moved or a step did not fit."""
        self._share = 0.0

    def begin_step(self) -> None:
        """Drop the notes of a failed step."""
        self._noted, self._found = [], None

    def note(self, is_needed: Tensor, num_rows: int, num_sent: int) -> None:
        """Note the row counts of a dispatch.

        is_needed [ranks, T] bool: whether the rank has an expert of the row. num_rows: T, or the
        bucket to which the rows are padded. num_sent: number of rows sent on each edge.
        """
        if num_rows >= _MIN_ROWS or num_sent < num_rows:
            self._noted.append(_Noted(is_needed.sum(1).max(), num_rows, num_sent))

    def take_noted(self) -> NeededRows:
        """Remove and return the notes of a captured step."""
        found = tuple(self._noted)
        self.begin_step()
        return found

    def put_noted(self, needed: NeededRows) -> None:
        """Set the notes of a replayed step."""
        self._noted = list(needed)

    def finish_step(self) -> None:
        """Start to copy the notes to the host for ``end_step``. Call it again after dispatches."""
        if self._noted and (self._found is None or len(self._found) < len(self._noted)):
            self._found = to_host_later(torch.stack([noted.needed for noted in self._noted]))

    def end_step(self) -> bool:
        """Return whether all needed rows were sent. The host must have waited for the device."""
        if self._found is None:
            return True
        is_complete, share = True, self._share * (1 - _DECAY)
        for most, noted in zip(self._found.tolist(), self._noted, strict=True):
            is_complete &= most <= noted.num_sent
            if noted.num_rows >= _MIN_ROWS:
                share = max(share, most / noted.num_rows)
        self._share = share
        self.begin_step()
        if not is_complete:
            self.forget()
        return is_complete
