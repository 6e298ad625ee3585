"""What a worker's heartbeat tells of its loop: that it turns, and whether it waits for a peer.

A step may take longer than the detection limit (a long prefill on a cold cache), so that progress
is counted within steps too: at each exchange with the experts.
"""

from __future__ import annotations

from types import TracebackType


class Activity:
    """Counters of one data thread, read by the control thread."""

    def __init__(self) -> None:
        self.progress = 0
        """Grows with every turn of the loop and every exchange of a step."""
        self.is_waiting = False
        """The loop waits for a peer within a step; ``with activity:`` marks such a wait."""

    def advance(self) -> None:
        """Something got done."""
        self.progress += 1

    def __enter__(self) -> None:
        self.is_waiting = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.is_waiting = False
        self.progress += 1
