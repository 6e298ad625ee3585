"""Endless streams through a real gateway, and the longest pause of any stream during a fault."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

from benchmarks.harness.cluster_gateway import ClusterGateway
from cluster.core.errors import ExpertMeshError
from gateway.core.call import GenerateCall

LIMIT_S = 60.0
"""Longest time to wait for deltas."""
_POLL_S = 0.005


@dataclass(slots=True)
class Line:
    """Deltas of one client, which runs calls in sequence."""

    calls: list[list[float]] = field(default_factory=list)
    """For each call, the monotonic times of its deltas."""

    @property
    def num_deltas(self) -> int:
        """Number of deltas of all calls."""
        return sum(map(len, self.calls))


class Load:
    """Deltas and failures of all clients."""

    def __init__(self, num_clients: int) -> None:
        self.lines = [Line() for _ in range(num_clients)]
        self.failures: list[str] = []
        """Error texts of all failed calls."""

    def wait_deltas(self, count: int) -> None:
        """Wait until every client has ``count`` more deltas. Raises ``TimeoutError``."""
        wanted = [line.num_deltas + count for line in self.lines]
        wait(
            lambda: all(line.num_deltas >= w for line, w in zip(self.lines, wanted, strict=True)),
            "deltas for all clients",
        )

    def longest_pause(self, since: float, until: float = float("inf")) -> float:
        """Longest time between two deltas of one call that overlaps the given interval."""
        return max(
            (
                later - earlier
                for line in self.lines
                for times in list(line.calls)
                for earlier, later in pairwise(list(times))
                if later > since and earlier < until
            ),
            default=0.0,
        )


class FaultLoad(Load):
    """Clients that repeat their call as soon as it has ended."""

    def __init__(self, gateway: ClusterGateway, calls: Sequence[GenerateCall]) -> None:
        """Create one client for each of ``calls``."""
        super().__init__(len(calls))
        self._gateway = gateway
        self._calls = calls
        self._numbers = itertools.count()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run all clients for the duration of a ``with`` block."""
        self.lines[:] = [Line() for _ in self._calls]
        work = self._gateway.spawn(self._ask_all())
        try:
            yield
        finally:
            work.cancel()
            self._gateway.run(asyncio.sleep(0))

    async def _ask_all(self) -> None:
        pairs = zip(self._calls, self.lines, strict=True)
        await asyncio.gather(*(self._ask(call, line) for call, line in pairs))

    async def _ask(self, call: GenerateCall, line: Line) -> None:
        while True:
            try:
                generation = await self._gateway.begin(call, f"load-{next(self._numbers)}")
                line.calls.append([])
                with generation:
                    while not generation.is_finished:
                        if await generation.next():
                            line.calls[-1].append(time.monotonic())
            except ExpertMeshError as err:
                self.failures.append(f"{type(err).__name__}: {err}")
                await asyncio.sleep(0.05)


def wait(is_so: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    """Wait until ``is_so()``. Raises ``TimeoutError``."""
    deadline = time.monotonic() + limit_s
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"gave up waiting for {what}")
        time.sleep(_POLL_S)
