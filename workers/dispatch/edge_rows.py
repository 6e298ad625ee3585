"""How many of its rows an attention rank must send to a single expert rank.

With more expert ranks than experts of a row, most rows have nothing to do on most of them. Which
ones have, the host could learn only by waiting for the device, and both ends must know the size of
a message before. So the number of rows on an edge is fixed for a step, from what was needed of
late, and the rows that are needed go first. Where they do not fit, the step is dropped and runs
again with all rows of this rank: nothing counts before it is committed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from workers.model.host_copies import to_host_later
from workers.requests.step_header import WHOLE

_DECAY = 1 / 128
"""Of the share, each step: a peak counts for some seconds."""
_MIN_ROWS = 16
"""Fewer rows are all sent, and say little of the share that an expert rank needs of many."""


class _Noted(NamedTuple):
    """One dispatch."""

    needed: Tensor
    """[] int64: the most rows that an expert rank needed."""
    num_rows: int
    num_sent: int


NeededRows = Sequence[_Noted]
"""What a captured step notes: its replays fill the tensors anew."""


class EdgeRows:
    """What the edges of one attention rank needed. Data thread only."""

    def __init__(self) -> None:
        self.can_limit = False
        """Edges of this generation may carry fewer rows than the rank has."""
        self._share = 0.0
        self._noted: list[_Noted] = []
        self._found: Tensor | None = None

    @property
    def share(self) -> int:
        """``StepProposal.edge_share``, where edges can be limited."""
        return math.ceil(self._share * WHOLE)

    def forget(self) -> None:
        """Experts have moved, or a step did not fit: begin anew."""
        self._share = 0.0

    def begin_step(self) -> None:
        """Drop what is left of a step that broke."""
        self._noted, self._found = [], None

    def note(self, is_needed: Tensor, num_rows: int, num_sent: int) -> None:
        """Note a dispatch.

        is_needed [ranks, T] bool: the rank has an expert of the row; num_rows: T, or the bucket up
        to which the rows are filled; num_sent: rows on each edge.
        """
        if num_rows >= _MIN_ROWS or num_sent < num_rows:
            self._noted.append(_Noted(is_needed.sum(1).max(), num_rows, num_sent))

    def take_noted(self) -> NeededRows:
        """What was noted in a step that is captured."""
        found = tuple(self._noted)
        self.begin_step()
        return found

    def put_noted(self, needed: NeededRows) -> None:
        """A captured step was replayed."""
        self._noted = list(needed)

    def finish_step(self) -> None:
        """Begin to copy what was noted to the host, where ``end_step`` reads it. Comes again after
        further dispatches.
        """
        if self._noted and (self._found is None or len(self._found) < len(self._noted)):
            self._found = to_host_later(torch.stack([noted.needed for noted in self._noted]))

    def end_step(self) -> bool:
        """Whether all rows that were needed were sent; the host must have waited for the device."""
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
