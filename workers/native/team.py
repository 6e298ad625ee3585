"""The team of threads of one worker's kernels."""

from __future__ import annotations

import logging
import os
import weakref
from dataclasses import dataclass, replace

from workers.native.library import Library, LibraryChoice, find_library

logger = logging.getLogger(__name__)

_SPINS = 1_000
"""Pauses that an idle thread spins before it sleeps: some 30 microseconds on an AMD EPYC, longer
than most barriers take. One that spins longer keeps a core from the gateway, and from a thread of
its own team that waits for one. Two cores of a virtual machine, in turns, decode rate over HTTP of
the mini model with 1,000 against 16,000: batch 1 / 8 / 32 1.38 / 1.17 / 1.19; against 200: 0.91 /
0.89 / 0.99. The engine alone shows no difference beyond the noise there; on another such machine it
was 1.05 to 1.10 times as fast with 8,000 as with 2,000."""
_ERRORS = (
    "",
    "another thread computes with the team",
    "there is no memory for the kernels' intermediate results",
    "a row names an expert slot that is missing or empty",
    "a row has no input, or its token no embedding",
)
"""By ``enum result``."""


def check(result: int) -> None:
    """Raise ``IndexError`` or ``RuntimeError`` for what a kernel returned."""
    if result:
        raise (IndexError if result >= 3 else RuntimeError)(_ERRORS[result])


class Team:
    """The calling thread and ``count`` - 1 others, for one calling thread at a time."""

    def __init__(self, library: Library, count: int) -> None:
        """Start the threads. Raises ``RuntimeError`` where the system gives none."""
        self.count = count
        self._start(library)

    def use(self, library: Library) -> None:
        """Compute with another library from now on. Called by the thread that computes.

        Packed weights are those of all libraries. Raises ``RuntimeError`` as for a new team.
        """
        if library.path != self.library.path:
            self._end()
            self._start(library)

    def _start(self, library: Library) -> None:
        self.library, count = library, self.count
        functions = library.functions
        # Threads that wait for a core would wait for one that spins on it.
        num_spins = _SPINS if count <= len(os.sched_getaffinity(0)) else 0
        self.pointer: int | None = functions.team_new(count, num_spins)
        if not self.pointer:
            raise RuntimeError(f"the system gives no {count - 1} threads for the kernels")
        # Not at the end of the process: a thread may still compute then.
        self._end = weakref.finalize(self, functions.team_free, self.pointer)
        self._end.atexit = False


@dataclass(frozen=True, slots=True)
class Kernels:
    """What a worker computes with."""

    team: Team | None
    """None: torch."""
    words: str
    """The instruction set, and why not a better one, or why torch; for people."""

    def noting(self, exception: str) -> Kernels:
        """The same with what torch computes nevertheless, which is logged; "" for nothing."""
        if self.team is None or not exception:
            return self
        logger.warning("kernels: %s", exception)
        return replace(self, words=f"{self.words}; {exception}")


def start_kernels(num_threads: int, why_torch: str = "") -> Kernels:
    """A team with the best kernels of this machine, where ``why_torch`` has nothing against it."""
    found = LibraryChoice(None, why_torch) if why_torch else find_library()
    is_surprise = found.library is None and not why_torch
    logger.log(logging.WARNING if is_surprise else logging.INFO, "kernels: %s", found.words)
    return Kernels(Team(found.library, num_threads) if found.library else None, found.words)
