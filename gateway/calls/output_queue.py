"""Bounded queue of a call's engine outputs, and the registry of running calls."""

from __future__ import annotations

import asyncio
import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable

from cluster.core.errors import ExpertMeshError, RequestAbortedError
from gateway.core.errors import SlowClientError
from workers.requests.request import TokenOutput

_OUTPUT_BYTES = 350
_LOGPROB_BYTES = 170
_TOP_BYTES = 120
"""Measured bytes of one alternative to a token; above, of an output and of a log-probability."""

_EVENTS_PER_CPU_S = 1250
"""Maximum number of events (pieces of streamed output) per second and host processor. An event
takes about 0.1 ms at the gateway and 0.1 ms at a client (``benchmarks.gateway_cost``)."""
_MAX_INTERVAL_S = 0.02


class OutputQueue:
    """Engine outputs of one call that the client has not received yet.

    Args:
        max_bytes: maximum memory of waiting outputs. If they need more, the call fails with
            ``SlowClientError`` and the queue is emptied. Log-probabilities of prompts and beams,
            and arrays, do not count, as the engine sends them once.
        limit_s: longest time in seconds that outputs may wait. If the oldest has waited longer when
            another arrives, the call fails in the same way.
        interval_s: returns the shortest time between two ``take`` calls with outputs (see
            ``CallRegistry.interval_s``). The last output of a choice is not delayed.
        clock: returns the time in seconds; None selects ``time.monotonic``.
    """

    def __init__(
        self,
        max_bytes: int,
        limit_s: float = math.inf,
        interval_s: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._max_bytes = max_bytes
        self._limit_s = limit_s
        self._interval_s = interval_s
        self._clock = clock or time.monotonic
        self._num_bytes = 0
        self.on_overflow: Callable[[], None] = lambda: None
        """Function that is called once the call has failed with ``SlowClientError``."""
        self._outputs: deque[TokenOutput] = deque()
        self._error: ExpertMeshError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self.arrivals_s: list[float] = []
        """Arrival time, by ``clock``, of each output that the last ``take`` returned."""
        self.oldest_s = 0.0
        """Arrival time of the first output of the last ``take`` with outputs; 0 before."""
        self._waiting_s: list[float] = []
        self._last_take_s = -math.inf

    def put(self, output: TokenOutput) -> None:
        """Add an output of an engine; if that exceeds a limit, end the call with an error.

        The error, ``SlowClientError``, is not raised here but by ``take`` and ``check``.
        """
        now_s = self._clock()
        self._num_bytes += _size(output)
        is_full = self._num_bytes > self._max_bytes
        if self._outputs and (is_full or now_s - self._waiting_s[0] > self._limit_s):
            self._outputs.clear()
            self._waiting_s.clear()
            why = "reads too slowly" if is_full else f"has read nothing for {self._limit_s:g} s"
            self.fail(SlowClientError(f"the client {why}"))
            self.on_overflow()
            return
        self._outputs.append(output)
        self._waiting_s.append(now_s)
        if self._waiter is None:
            return
        wait_s = self._last_take_s + self._interval_s() - now_s
        if wait_s <= 0 or output.finish_reason is not None:
            self._wake()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._wake)

    def fail(self, error: ExpertMeshError) -> None:
        """End the call with an error; later errors are ignored."""
        self._error = self._error or error
        self._wake()

    def check(self) -> None:
        """Raise the error that ended the call, if ``fail`` has ended it."""
        if self._error is not None:
            raise self._error.with_traceback(None)  # without the frames of other calls

    def forget_error(self) -> None:
        """Forget the error of an ended call: the error's frames refer to this queue."""
        self._error = None

    async def take(self, timeout_s: float) -> list[TokenOutput]:
        """Wait for outputs and return all waiting outputs; an empty list after ``timeout_s``.

        Raises:
            ExpertMeshError: the error of ``fail``, after all earlier outputs were taken.
        """
        if not self._outputs and self._error is None:
            await self._wait(timeout_s)
        taken = list(self._outputs)
        self._outputs.clear()
        self.arrivals_s, self._waiting_s = self._waiting_s, []
        self._num_bytes = 0
        if taken:
            self.oldest_s, self._last_take_s = self.arrivals_s[0], self._clock()
        elif self._error is not None:
            raise self._error.with_traceback(None)  # without the frames of other calls
        return taken

    async def _wait(self, timeout_s: float) -> None:
        """Wait for an output, an error or the end of ``timeout_s`` seconds.

        This runs for every event, for which ``asyncio.timeout`` is too slow.
        """
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        end = loop.call_later(timeout_s, self._wake)
        try:
            await self._waiter
        finally:
            end.cancel()
            self._waiter = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _size(output: TokenOutput) -> int:
    if not output.logprobs or output.score is not None:
        return _OUTPUT_BYTES
    tops = sum(_LOGPROB_BYTES + _TOP_BYTES * len(one.top_ids) for one in output.logprobs)
    return _OUTPUT_BYTES + tops


class CallRegistry:
    """The running calls of a gateway replica, by the names that clients know.

    Several calls may have the same name: clients choose ``x-request-id``.

    Args:
        num_cpus: number of processors that this process may use.
    """

    def __init__(self, num_cpus: int) -> None:
        self._names: defaultdict[OutputQueue, set[str]] = defaultdict(set)
        self._max_events_per_s = num_cpus * _EVENTS_PER_CPU_S

    def __len__(self) -> int:
        return len(self._names)

    def interval_s(self) -> float:
        """Return the seconds for which a call's outputs are collected and sent as one event.

        Sending events then takes at most about a tenth of the host's processors, which workers
        may share. No token waits longer than ``_MAX_INTERVAL_S``.
        """
        return min(len(self._names) / self._max_events_per_s, _MAX_INTERVAL_S)

    def add(self, name: str, queue: OutputQueue) -> None:
        """Add a name, such as the call id, of the running call with this output queue."""
        self._names[queue].add(name)

    def remove(self, queue: OutputQueue) -> None:
        self._names.pop(queue, None)

    def abort(self, names: Iterable[str]) -> list[str]:
        """End the calls with these names; return the names that had a running call."""
        wanted = dict.fromkeys(names)
        for queue, known in self._names.items():
            if not known.isdisjoint(wanted):
                queue.fail(RequestAbortedError("the request was ended by an operator"))
        running: set[str] = set().union(*self._names.values())
        return [name for name in wanted if name in running]

    def fail(self, error: ExpertMeshError) -> None:
        for queue in self._names:
            queue.fail(error)
