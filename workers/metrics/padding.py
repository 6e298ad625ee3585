"""Measures the share of padding in the rows that an expert worker receives and returns.

The static exchange (``workers.dispatch.row_exchange``) sends every granted row to every expert
rank, so that message sizes are known beforehand. A row without an expert on a rank is padding
there, in dispatch and, if sums are returned, in combine. The exact exchange and outputs by pair
have no padding, and transports add none.
"""

from __future__ import annotations

DECAY = 0.99
"""Factor on the weight of earlier exchanges for each new one."""


class PaddingRatio:
    """Share of padding in the rows of recent exchanges, by direction.

    An exponential average over the rows of about ``1 / (1 - DECAY)`` exchanges. Only the data
    thread adds; any thread may read.
    """

    def __init__(self) -> None:
        self._sums = dict.fromkeys(("dispatch", "combine"), (0.0, 0.0))

    def add(self, direction: str, num_rows: int, num_used: int) -> None:
        """Add an exchange of ``num_rows`` rows, of which ``num_used`` were used."""
        rows, padding = self._sums[direction]
        padding = DECAY * padding + num_rows - num_used
        self._sums[direction] = (DECAY * rows + num_rows, padding)

    def ratio(self, direction: str) -> float:
        """Share of padding, from 0 to less than 1; 0 before the first exchange."""
        rows, padding = self._sums[direction]
        return padding / rows if rows else 0.0

    def stats(self) -> dict[str, float]:
        return {
            f'dispatch_padding_ratio{{direction="{direction}"}}': self.ratio(direction)
            for direction in self._sums
        }
