"""Measures pauses of client streams at changes of the generation, by arrival of tokens. Pure."""

from __future__ import annotations

from collections import deque

MIN_GAP_S = 0.02
"""Shortest time in seconds between two tokens of a stream that counts as a gap."""
MAX_SNAPSHOT_DELAY_S = 1.0
"""Longest assumed delay in seconds between a change of the generation and its snapshot. Gaps that
ended in this time before the snapshot arrives count, too."""
_KEPT = 1024


class PauseTracker:
    """Finds the longest gap between two tokens of a stream around the newest change of the
    generation. Times are by ``time.monotonic``.
    """

    def __init__(self) -> None:
        self._generation = 0
        self._since_s = 0.0
        self._recent: deque[tuple[float, float]] = deque(maxlen=_KEPT)  # (end, length)
        self._longest_s = self._reported_s = 0.0

    def change(self, generation: int, now_s: float) -> bool:
        """Record a snapshot's generation; return whether it is new, so that a pause may follow.

        The first generation returns False.
        """
        if generation <= self._generation:
            return False
        is_first = not self._generation
        self._generation, self._since_s = generation, now_s
        recent = (length for end_s, length in self._recent if now_s - end_s <= MAX_SNAPSHOT_DELAY_S)
        self._longest_s = 0.0 if is_first else max(recent, default=0.0)
        self._reported_s = 0.0
        return not is_first

    def token(self, last_s: float, now_s: float) -> None:
        """Record the arrival times of two consecutive tokens of a client stream."""
        length = now_s - last_s
        if length < MIN_GAP_S:
            return
        self._recent.append((now_s, length))
        if last_s <= self._since_s:
            self._longest_s = max(self._longest_s, length)

    def take(self) -> tuple[int, float] | None:
        """Return the newest generation and its longest pause in seconds; None if the pause has not
        grown since the last call.
        """
        if self._longest_s <= self._reported_s:
            return None
        self._reported_s = self._longest_s
        return self._generation, self._longest_s
