"""How many of its rows an attention rank must send to a single expert rank.

With more expert ranks than experts of a row, most rows have nothing to do on most of them. Which
ones have, the host could learn only by waiting for the device, and both ends must know the size of
a message before. So the number of rows on an edge is fixed for a step, from what was needed of
late, and the rows that are needed go first. Where they do not fit, the step is dropped and runs
again with all rows: nothing counts before it is committed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.model.host_copies import to_host_later
from workers.requests.step_header import WHOLE

_DECAY = 1 / 128
"""Of the share, each step: a peak counts for some seconds."""


class EdgeRows:
    """What the edges of one attention rank needed. Data thread only."""

    def __init__(self) -> None:
        self._share = 0.0
        self._needed: list[Tensor] = []
        self._sizes: list[tuple[int, int]] = []
        self._found: Tensor | None = None

    @property
    def share(self) -> int:
        """``StepProposal.edge_share``."""
        return min(WHOLE, -int(-self._share * WHOLE // 1))

    def forget(self) -> None:
        """Experts have moved, or a step did not fit: begin anew."""
        self._share = 0.0

    def begin_step(self) -> None:
        """Drop what is left of a step that broke."""
        self._needed, self._sizes, self._found = [], [], None

    def note(self, is_needed: Tensor, num_sent: int) -> None:
        """A dispatch: [ranks, T] bool, whether a rank has an expert of a row; rows on each edge."""
        if not is_needed.shape[1]:
            return  # nothing may be computed of its outputs, for which the host waits
        self._needed.append(is_needed.sum(1).max())
        self._sizes.append((is_needed.shape[1], num_sent))

    def finish_step(self) -> None:
        """Begin to copy what was noted to the host, where ``end_step`` reads it."""
        if self._needed:
            self._found = to_host_later(torch.stack(self._needed))

    def end_step(self) -> bool:
        """Whether all rows that were needed were sent; the host must have waited for the device."""
        if self._found is None:
            return True
        needed: Sequence[int] = self._found.tolist()
        pairs = list(zip(needed, self._sizes, strict=True))
        shares = [most / num_rows for most, (num_rows, _) in pairs if num_rows]
        self._share = max([self._share * (1 - _DECAY), *shares])
        is_complete = all(most <= num_sent for most, (_, num_sent) in pairs)
        self.begin_step()
        if not is_complete:
            self.forget()
        return is_complete
