"""Interrupts of the data thread's waits by other threads."""

from __future__ import annotations

import selectors

from cluster.core.errors import GenerationChangedError
from workers.transport.socket_io import WakePipe


class Interrupts:
    """Ends waits of the data thread for reasons other than its sockets.

    Any thread may call ``wake``, ``interrupt`` and ``leave``; only the data thread may call the
    other methods.
    """

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._announced = 0
        self._left = -1
        self._woken = False
        self.wakeup = WakePipe()
        """Pipe of ``wake``, which ends waits for the next step but not waits within a step."""
        self._interrupts = WakePipe()
        for pipe in (self.wakeup, self._interrupts):
            selector.register(pipe, selectors.EVENT_READ, pipe.drain)

    def wake(self) -> None:
        """End the current or next ``StepChannel.wait``."""
        self._woken = True
        self.wakeup.ring()

    def interrupt(self, generation: int) -> None:
        """Make waits raise ``GenerationChangedError`` until ``generation`` is applied."""
        self._announced = max(self._announced, generation)
        self._interrupts.ring()

    def leave(self, generation: int) -> None:
        """Make waits of steps raise until a later generation than ``generation`` is applied."""
        self._left = max(self._left, generation)
        self._interrupts.ring()

    def take_wake(self) -> bool:
        """Whether ``wake`` was called since the last call."""
        woken, self._woken = self._woken, False
        return woken

    def check_announced(self, generation: int) -> None:
        """Raise ``GenerationChangedError`` if a later generation was announced."""
        if self._announced > generation:
            raise GenerationChangedError(f"generation {self._announced} was announced")

    def check_left(self, generation: int) -> None:
        """Raise ``GenerationChangedError`` if this generation was left."""
        if self._left >= generation:
            raise GenerationChangedError(f"generation {generation} was left")

    def close(self) -> None:
        """Close the pipes. Later calls have no effect."""
        self.wakeup.close()
        self._interrupts.close()
