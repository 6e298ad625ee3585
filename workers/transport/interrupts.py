"""Lets other threads end the waits of a worker's data thread."""

from __future__ import annotations

import selectors

from cluster.core.errors import GenerationChangedError
from workers.transport.socket_io import WakePipe


class Interrupts:
    """Lets other threads end waits of the data thread: for new work or a change of generation.

    Any thread may call ``wake``, ``interrupt`` and ``leave``; only the data thread may call the
    other methods.
    """

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self._announced = 0
        self._left = -1
        self._woken = False
        self.wakeup = WakePipe()
        """Pipe that ``wake`` writes to; it ends waits for the next step, not waits in a step."""
        self._interrupts = WakePipe()
        for pipe in (self.wakeup, self._interrupts):
            selector.register(pipe, selectors.EVENT_READ, pipe.drain)

    def wake(self) -> None:
        """End the current or next ``StepChannel.wait``, in which the worker waits for a step."""
        self._woken = True
        self.wakeup.ring()

    def interrupt(self, generation: int) -> None:
        """Make all waits raise ``GenerationChangedError`` until ``generation`` is applied."""
        self._announced = max(self._announced, generation)
        self._interrupts.ring()

    def leave(self, generation: int) -> None:
        """Make waits in steps raise ``GenerationChangedError`` until a later generation is applied.

        ``generation``: the generation whose steps this worker no longer runs.
        """
        self._left = max(self._left, generation)
        self._interrupts.ring()

    def take_wake(self) -> bool:
        """Return whether ``wake`` was called since the last call of this method."""
        woken, self._woken = self._woken, False
        return woken

    def check_announced(self, generation: int) -> None:
        """Raise ``GenerationChangedError`` if ``interrupt`` announced a later generation."""
        if self._announced > generation:
            raise GenerationChangedError(f"generation {self._announced} was announced")

    def check_left(self, generation: int) -> None:
        """Raise ``GenerationChangedError`` if ``leave`` ended ``generation`` on this worker."""
        if self._left >= generation:
            raise GenerationChangedError(f"generation {generation} was left")

    def close(self) -> None:
        """Close the pipes. Later calls of ``wake``, ``interrupt`` and ``leave`` end no wait."""
        self.wakeup.close()
        self._interrupts.close()
