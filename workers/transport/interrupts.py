"""What other threads may do to the waits of the data thread."""

from __future__ import annotations

import selectors

from cluster.core.errors import GenerationChangedError
from workers.transport.socket_io import WakePipe


class Interrupts:
    """Decides whether a wait of the data thread must end for a reason other than its sockets.

    ``wake``, ``interrupt`` and ``leave`` may be called by any thread, all else by the data thread.
    """

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._announced = 0
        self._left = -1
        self._woken = False
        self.wakeup = WakePipe()
        """Rings at ``wake``: it ends a wait for steps, and not one within a step."""
        self._interrupts = WakePipe()
        for pipe in (self.wakeup, self._interrupts):
            selector.register(pipe, selectors.EVENT_READ, pipe.drain)

    def wake(self) -> None:
        """End the current or next ``StepChannel.wait``."""
        self._woken = True
        self.wakeup.ring()

    def interrupt(self, generation: int) -> None:
        """Make waits raise until an announced generation is applied."""
        self._announced = max(self._announced, generation)
        self._interrupts.ring()

    def leave(self, generation: int) -> None:
        """Make the waits of steps raise until a later generation is applied."""
        self._left = max(self._left, generation)
        self._interrupts.ring()

    def take_wake(self) -> bool:
        """Whether ``wake`` was called since the last time."""
        woken, self._woken = self._woken, False
        return woken

    def check_announced(self, generation: int) -> None:
        """Raise ``GenerationChangedError`` if a later generation than this one was announced."""
        if self._announced > generation:
            raise GenerationChangedError(f"generation {self._announced} was announced")

    def check_left(self, generation: int) -> None:
        """Raise ``GenerationChangedError`` if this generation was left."""
        if self._left >= generation:
            raise GenerationChangedError(f"generation {generation} was left")

    def close(self) -> None:
        """Calls have no effect afterwards."""
        self.wakeup.close()
        self._interrupts.close()
