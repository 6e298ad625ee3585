"""What a heartbeat reports of the data thread: its progress, and whether it waits for a peer.

A step may take longer than the detection limit (a long prefill on a cold cache), so progress is
also counted within steps, at each exchange with the experts.
"""

from __future__ import annotations


class Activity:
    """Counters of one data thread, read by the control thread."""

    def __init__(self) -> None:
        self.progress = 0
        """Grows with every iteration of the loop and every exchange of a step."""
        self.is_waiting = False
        """The data thread waits for a peer within a step (``with activity:``)."""
        self.is_idle = True
        """The data thread has no work."""

    def advance(self) -> None:
        self.progress += 1

    def __enter__(self) -> None:
        self.is_waiting = True

    def __exit__(self, *error: object) -> None:
        self.is_waiting = False
        self.progress += 1
