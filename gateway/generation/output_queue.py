"""Where the engines' outputs of each call wait for the codec, bounded; calls by their names."""

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
"""Memory of an output, of the log-probability of its token, and of each alternative (measured)."""


class OutputQueue:
    """The engines' outputs of one call that the client has not received yet.

    Args:
        max_bytes: memory of the outputs that may wait. Above it the call ends with
            ``SlowClientError``, and nothing waits any more. Log-probabilities of prompts and of
            beams, and arrays, come once, and do not count.
        limit_s: time for which outputs may wait and none is taken; then it ends in the same way
            when the next one comes.
        clock: in seconds; None: ``time.monotonic``.
    """

    def __init__(
        self,
        max_bytes: int,
        limit_s: float = math.inf,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._max_bytes = max_bytes
        self._limit_s = limit_s
        self._clock = clock or time.monotonic
        self._num_bytes = 0
        self.on_overflow: Callable[[], None] = lambda: None
        """Called when the call has ended in this way."""
        self._outputs: deque[TokenOutput] = deque()
        self._error: ExpertMeshError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.oldest_s = 0.0
        """When the first output of the last ``take`` came, on ``clock``."""
        self._first_s = 0.0

    def put(self, output: TokenOutput) -> None:
        now = self._clock()
        if not self._outputs:
            self._first_s = now
        self._num_bytes += _size(output)
        is_full = self._num_bytes > self._max_bytes
        if self._outputs and (is_full or now - self._first_s > self._limit_s):
            self._outputs.clear()
            why = "reads too slowly" if is_full else f"has read nothing for {self._limit_s:g} s"
            self.fail(SlowClientError(f"the client {why}"))
            self.on_overflow()
            return
        self._outputs.append(output)
        self._wake()

    def fail(self, error: ExpertMeshError) -> None:
        """End the call with an error; only the first one counts."""
        self._error = self._error or error
        self._wake()

    def check(self) -> None:
        """Raise the error of ``fail``, if there is one."""
        if self._error is not None:
            raise self._error

    async def take(self, timeout_s: float) -> list[TokenOutput]:
        """All queued outputs, after waiting for the first; none after ``timeout_s``.

        Raises:
            ExpertMeshError: the error of ``fail``, once the outputs before it are taken.
        """
        if not self._outputs and self._error is None:
            await self._wait(timeout_s)
        taken = list(self._outputs)
        self._outputs.clear()
        self._num_bytes = 0
        self.oldest_s = self._first_s
        if self._error is not None and not taken:
            raise self._error
        return taken

    async def _wait(self, timeout_s: float) -> None:
        """Until something comes; once for every token, so without ``asyncio.timeout``."""
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_later(timeout_s, self._wake)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _size(output: TokenOutput) -> int:
    if not output.logprobs or output.score is not None:
        return _OUTPUT_BYTES
    tops = sum(_LOGPROB_BYTES + _TOP_BYTES * len(one.top_ids) for one in output.logprobs)
    return _OUTPUT_BYTES + tops


class CallRegistry:
    """The calls of this replica that have not ended, by the names that clients know them by.

    Several calls may have the same name: clients choose ``x-request-id``.
    """

    def __init__(self) -> None:
        self._names: defaultdict[OutputQueue, set[str]] = defaultdict(set)

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: str, queue: OutputQueue) -> None:
        """Give a call one more name."""
        self._names[queue].add(name)

    def remove(self, queue: OutputQueue) -> None:
        self._names.pop(queue, None)

    def abort(self, names: Iterable[str]) -> list[str]:
        """End the calls of these names; returns the names that were found."""
        wanted = dict.fromkeys(names)
        for queue, known in self._names.items():
            if not known.isdisjoint(wanted):
                queue.fail(RequestAbortedError("the request was ended by an operator"))
        running: set[str] = set().union(*self._names.values())
        return [name for name in wanted if name in running]

    def fail(self, error: ExpertMeshError) -> None:
        for queue in self._names:
            queue.fail(error)
