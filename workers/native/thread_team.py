"""Team of threads that run the compiled CPU kernels of one worker."""

from __future__ import annotations

import logging
import os
import weakref
from dataclasses import dataclass, replace

from workers.native.library import Library, LibraryChoice, find_library

logger = logging.getLogger(__name__)

_SPINS = 1_000
"""Number of pause instructions that an idle thread spins before it sleeps: some 30 microseconds on
an AMD EPYC, longer than most barriers. A thread that spins longer keeps a core from the gateway, or
from a waiting thread of its own team. Measured decode rate over HTTP of the mini model on two cores
of a virtual machine, at batch 1 / 8 / 32, relative to 16,000 pauses: 1.38 / 1.17 / 1.19; relative
to 200 pauses: 0.91 / 0.89 / 0.99. The engine alone shows no difference beyond the noise; on another
such machine it was 1.05 to 1.10 times as fast with 8,000 as with 2,000."""
_ERRORS = (
    "",
    "another thread computes with the team",
    "no memory for the kernels' intermediate results",
    "a row names an expert slot that is missing or empty",
    "a row has no input, or its token has no embedding",
)
"""Error texts, in the order of the values of ``enum result`` in C."""


def check(result: int) -> None:
    """Raise ``IndexError`` or ``RuntimeError`` if a kernel's result is an error; 0 is success."""
    if result:
        raise (IndexError if result >= 3 else RuntimeError)(_ERRORS[result])


class ThreadTeam:
    """Threads that run CPU kernels: the calling thread and ``count`` - 1 others. One thread at a
    time may use the team."""

    def __init__(self, library: Library, count: int) -> None:
        """Start ``count`` - 1 threads. Raises ``RuntimeError`` if the system cannot create them."""
        self.count = count
        self._start(library)

    def use(self, library: Library) -> None:
        """Switch to another kernel library. Call it on the thread that computes.

        Packed weights stay valid: all libraries use the same layout. Raises ``RuntimeError`` if the
        system cannot create threads.
        """
        if library.path != self.library.path:
            self._end()
            self._start(library)

    def _start(self, library: Library) -> None:
        self.library, count = library, self.count
        functions = library.functions
        # With more threads than cores, a spinning thread would keep a core from a working one.
        num_spins = _SPINS if count <= len(os.sched_getaffinity(0)) else 0
        self.pointer: int | None = functions.team_new(count, num_spins)
        if not self.pointer:
            raise RuntimeError(f"cannot start {count - 1} threads for the kernels")
        # Not at the end of the process, as a thread may still compute.
        self._end = weakref.finalize(self, functions.team_free, self.pointer)
        self._end.atexit = False


@dataclass(frozen=True, slots=True)
class Kernels:
    """Compiled CPU kernels that a worker uses, if any."""

    team: ThreadTeam | None
    """Threads that run the kernels; None if torch computes."""
    description: str
    """Text for logs: the instruction set and why no better one is used, or why torch computes."""

    def with_exception(self, exception: str) -> Kernels:
        """Log ``exception``, a part that torch computes instead, and return kernels with it in
        their description. Without a team, or if ``exception`` is ``""``, nothing changes."""
        if self.team is None or not exception:
            return self
        logger.warning("kernels: %s", exception)
        return replace(self, description=f"{self.description}; {exception}")


def start_kernels(num_threads: int, why_torch: str = "") -> Kernels:
    """Start a team with the best compiled kernels of this machine; no team if there are none.

    ``why_torch``: a reason to use no kernels, for the description; ``""``: use them.
    """
    found = LibraryChoice(None, why_torch) if why_torch else find_library()
    is_surprise = found.library is None and not why_torch
    logger.log(logging.WARNING if is_surprise else logging.INFO, "kernels: %s", found.description)
    return Kernels(
        ThreadTeam(found.library, num_threads) if found.library else None, found.description
    )
