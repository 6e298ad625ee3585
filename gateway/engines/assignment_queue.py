"""Queue of requests that the gateway has not yet sent to an attention worker."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator

from cluster.core.errors import RequestFailedError
from gateway.core.replay import ReplayCause
from gateway.engines.disconnects import DisconnectResolver
from gateway.engines.engine_client import EngineClient
from gateway.engines.request_router import RequestRouter
from gateway.engines.submission import Submission
from gateway.engines.worker_registry import WorkerRegistry

logger = logging.getLogger(__name__)

_REFUSED_RETRY_S = 0.1
"""Delay in seconds before a request may return to the worker that handed it back unfinished."""


class AssignmentQueue:
    """Sends each request to an attention worker as soon as a worker can take the request.

    All methods run on the event loop.

    Args:
        workers: the connected workers.
        router: chooses the worker of a request.
        disconnects: tracks workers that may be alive although their connection was lost.
        on_resubmit: called with each request that is sent to a worker again.
    """

    def __init__(
        self,
        workers: WorkerRegistry,
        router: RequestRouter,
        disconnects: DisconnectResolver,
        on_resubmit: Callable[[Submission], None],
    ) -> None:
        self._workers = workers
        self._router = router
        self._disconnects = disconnects
        self._on_resubmit = on_resubmit
        self.waiting: list[Submission] = []
        """Requests that wait for a worker."""
        self._is_scheduled = False

    def add(self, entry: Submission) -> None:
        """Queue a new request. Requests of the same event loop iteration are assigned together."""
        self.waiting.append(entry)
        if not self._is_scheduled:
            self._is_scheduled = True
            self.schedule()

    def schedule(self, delay_s: float = 0.0) -> None:
        """Assign the waiting requests on the event loop after ``delay_s`` seconds."""
        loop = asyncio.get_running_loop()
        if delay_s:
            loop.call_later(delay_s, self.assign_waiting)
        else:
            loop.call_soon(self.assign_waiting)

    def reassign(self, entries: Iterable[Submission]) -> None:
        """Assign requests that lost their worker, and all waiting requests."""
        self.waiting.extend(entries)
        self.assign_waiting()

    def requeue(self, entry: Submission) -> None:
        """Assign a request again that its worker has handed back unfinished."""
        entry.replay_cause = ReplayCause.HANDED_BACK
        self.waiting.append(entry)
        has_other = entry.num_returns == 1 and len(self._workers.ready) > 1
        self.schedule(0.0 if has_other else _REFUSED_RETRY_S)

    def move(
        self, entry: Submission, target: EngineClient | None, num_new: int, kv_peer: str = ""
    ) -> None:
        """Move a request from its worker to ``target``, or to any worker if ``target`` is None or
        is being drained. ``target`` must compute the last ``num_new`` tokens of the request, after
        it has fetched KV blocks from the worker ``kv_peer`` if given.
        """
        source = entry.stream
        assert isinstance(source, EngineClient), "a request can move only from a worker"
        source.detach(entry)
        entry.replay_cause = ReplayCause.HANDED_BACK if target is None else ReplayCause.MOVED
        if target is None or target.worker in self._workers.leaving:
            self.reassign([entry])
            return
        with self._isolate(entry):
            entry.kv_peer, entry.missing_tokens = kv_peer, num_new
            self._submit(entry, target, time.monotonic())

    def assign_waiting(self) -> None:
        """Send all waiting requests that a worker can take now, fewest tokens to compute first."""
        self._is_scheduled = False
        waiting, self.waiting = self.waiting, []
        now_s, ready = time.monotonic(), self._workers.ready
        unresolved = self._disconnects.unresolved(now_s)
        has_lone_request = any(e.must_be_sent_alone for e in waiting) and any(
            entry.may_kill_on_receipt for entry in self._workers.submissions
        )
        by_cost: list[tuple[int, Submission]] = []
        for entry in waiting:
            with self._isolate(entry):
                is_alone = len(waiting) == 1  # there is nothing to sort
                cost = 0 if is_alone else self._router.num_missing(entry, ready)
                by_cost.append((cost, entry))
        for _, entry in sorted(by_cost, key=lambda pair: pair[0]):
            if not entry.is_waiting or now_s >= entry.deadline_s:
                continue
            is_second_lone = entry.must_be_sent_alone and has_lone_request
            has_to_wait = is_second_lone or entry.needs_confirmation(unresolved)
            with self._isolate(entry):
                client = None if has_to_wait else self._router.pick(entry, ready)
                if client is None:
                    self.waiting.append(entry)
                    continue
                has_lone_request = has_lone_request or entry.must_be_sent_alone
                self._submit(entry, client, now_s)

    def _submit(self, entry: Submission, client: EngineClient, now_s: float) -> None:
        self._router.kv.expect(client.worker, entry.prompt_hashes)
        entry.pauses = self._router.is_handed_over(entry, client)
        is_again = entry.was_sent
        if is_again:
            entry.next_attempt(now_s)
        client.submit(entry)
        if is_again:
            self._on_resubmit(entry)

    @contextlib.contextmanager
    def _isolate(self, entry: Submission) -> Iterator[None]:
        """Context manager that fails only ``entry`` on an error, so that other requests proceed."""
        try:
            yield
        except Exception as err:
            name = entry.request.request_id
            logger.exception("could not assign request %s to a worker", name)
            entry.abort()
            entry.close()
            entry.sink.fail(RequestFailedError(f"request {name} could not be assigned: {err}"))
