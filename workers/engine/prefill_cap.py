"""The number of prompt rows in a step while other sequences decode. Pure: times are passed in.

A step ends for all ranks together, so a long chunk of one prompt delays every stream of the
cluster. The operator may set a target for the inter-token latency. The leader then learns the cost
of decode steps and prompt rows from its own steps, and grants as many prompt rows as fit. A row
costs less in a larger chunk (the expert weights are read anyway), and more in a longer context. The
estimate is therefore updated at every step.
"""

from __future__ import annotations

from typing import Self

from cluster.config.cluster import EngineSection

_TARGET_FRACTION = 0.9
"""Fraction of the target step time to use: each chunk of a prompt costs more than the previous."""
_NEW_WEIGHT = 0.5
"""Weight of the newest step in an estimate of step times."""
_MAX_OUTLIER = 2.0
"""Maximum ratio of observed to expected step time; caps the effect of a single slow step."""
_EXCESS_FACTOR = 1.5
"""A step longer than this multiple of the target step time reduces the cap in any case."""


class PrefillCap:
    """The leader's limit of prompt rows in a step, from its estimates of step times.

    Without a target step time, every rank may run its own maximum. If a target step time is set, a
    step that also decodes gets at most twice the prompt rows that an earlier step has computed
    within the target.
    """

    def __init__(self, *, max_rows: int, min_rows: int = 1, target_s: float | None = None) -> None:
        """``max_rows``: maximum prompt rows of one rank. ``min_rows``: rows that always may run.

        ``target_s``: target seconds of a step in which any sequence decodes; None for no target.
        """
        self._max_rows = max_rows
        self._min_rows = min(min_rows, max_rows)
        self._target_s = target_s
        self._decode_s: dict[int, float] = {}  # step time by ``_size`` of the decode rows
        self._prefill_s = 0.0  # time and number of prompt rows, both decaying
        self._prefill_rows = 0.0
        self._fitting_rows = self._min_rows

    @classmethod
    def of(cls, engine: EngineSection) -> Self:
        """Create the cap for a configuration; the tokens of one KV block are its minimum."""
        target_ms = engine.itl_target_ms
        return cls(
            max_rows=engine.step_tokens,
            min_rows=engine.block_size_tokens,
            target_s=None if target_ms is None else target_ms / 1000,
        )

    def rows(self, decode_rows: int, num_ranks: int) -> int:
        """Return the maximum number of prompt rows in the next step, over all ranks.

        ``decode_rows``: decode rows of all ranks in this step; 0 removes the limit by time. Without
        that limit the rows grow with the number of ranks, as each rank computes its own.
        """
        max_rows = self._max_rows * num_ranks
        if not decode_rows or self._target_s is None:
            return max_rows
        left_s = _TARGET_FRACTION * self._target_s - self._decode_time(decode_rows)
        if left_s <= 0:
            return self._min_rows
        cap, row_s = min(max_rows, 2 * self._fitting_rows), self._row_time()
        if row_s:
            cap = min(cap, int(left_s / row_s))
        return max(self._min_rows, cap)

    def observe(self, decode_rows: int, prefill_rows: int, seconds: float) -> None:
        """Update the estimates with a step. The numbers of rows are over all ranks.

        ``seconds``: time from the step's header until all ranks proposed again.
        """
        if self._target_s is None or not decode_rows + prefill_rows:
            return
        if not prefill_rows:
            self._learn_decode(decode_rows, seconds)
            return
        self._learn_prefill(decode_rows, prefill_rows, seconds)
        if not decode_rows:
            return
        size = _size(decode_rows)
        if size in self._decode_s:  # an upper bound without prompt rows
            self._decode_s[size] = min(self._decode_s[size], seconds)
        if seconds <= self._target_s:
            self._fitting_rows = max(self._fitting_rows, prefill_rows)
        elif seconds > _EXCESS_FACTOR * self._target_s:
            self._fitting_rows = max(self._min_rows, prefill_rows // 4)

    def _learn_decode(self, decode_rows: int, seconds: float) -> None:
        size = _size(decode_rows)
        known_s = self._decode_s.get(size, seconds)
        new_s = min(seconds, _MAX_OUTLIER * known_s)
        self._decode_s[size] = known_s + _NEW_WEIGHT * (new_s - known_s)

    def _learn_prefill(self, decode_rows: int, prefill_rows: int, seconds: float) -> None:
        decode_s = self._decode_time(decode_rows)
        if self._prefill_rows:
            seconds = min(seconds, _MAX_OUTLIER * (decode_s + self._row_time() * prefill_rows))
        self._prefill_s = (1 - _NEW_WEIGHT) * self._prefill_s + max(seconds - decode_s, 0.0)
        self._prefill_rows = (1 - _NEW_WEIGHT) * self._prefill_rows + prefill_rows

    def _row_time(self) -> float:
        return self._prefill_s / self._prefill_rows if self._prefill_rows else 0.0

    def _decode_time(self, decode_rows: int) -> float:
        """Return the expected seconds of a step without prompt rows, from steps of similar size.

        0.0 if no step is known.
        """
        if not decode_rows or not self._decode_s:
            return 0.0
        size = _size(decode_rows)
        return self._decode_s[min(self._decode_s, key=lambda s: (abs(s - size), -s))]


def _size(decode_rows: int) -> int:
    """Return the size class of a row count: 0 for 1, 1 for 2, 2 for 3 .. 4, 3 for 5 .. 8, ..."""
    return (decode_rows - 1).bit_length()
