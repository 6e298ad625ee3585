"""Hands requests with a computed prompt over from the prefill group to the decode group.

    prefill worker   prompt ───────────────▶ first token, pause ─▶ Paused
    decode worker      fetches the blocks of each step ┈┈┈┈┈┈┈┈┈┈┈┈┈▶ the last blocks, decodes

The prefill worker pauses such a request after its first token (``Request.pauses``), because its
next step may compute another long prompt. While the prompt is computed, the decode worker fetches
the blocks of each step, so that few blocks are left to fetch during the pause, at any length of
the prompt. If no decode worker has room, the prefill worker resumes the request until one has
(four times the request's tokens, at most half of its cache).
"""

from __future__ import annotations

from collections import Counter
from itertools import islice

from gateway.engines.assignment_queue import AssignmentQueue
from gateway.engines.engine_client import EngineClient
from gateway.engines.request_router import RequestRouter
from gateway.engines.submission import Submission
from gateway.engines.worker_registry import WorkerRegistry
from workers.requests.wire import Pause, Paused, Prefetched

_MAX_EARLY = 2
"""Maximum number of prompts of one prefill worker with an early fetch, before all their blocks are
computed. A worker computes few prompts at a time, so that later ones have no blocks."""


_MAX_RETRIED = 8
"""Maximum number of requests that stayed to look at, after each message of a decode worker."""


class HandOvers:
    """Hands the requests of a gateway over. All methods run on the event loop.

    Args:
        workers: the connected workers and the requests that each can run.
        router: chooses the decode worker of a request.
        assignments: reassigns a request from its worker to the decode worker.
    """

    def __init__(
        self, workers: WorkerRegistry, router: RequestRouter, assignments: AssignmentQueue
    ) -> None:
        self._workers = workers
        self._router = router
        self._assignments = assignments
        self._coming: dict[str, tuple[Submission, EngineClient]] = {}
        """Requests by id that move to a decode worker, from the first fetch of their blocks to
        their first token there."""
        self._fetching: dict[str, bool] = {}
        """Requests by id with an early fetch that has not ended, and whether another one was due
        since it began."""
        self._staying: dict[str, Submission] = {}
        """Requests by id that decode on a prefill worker until a decode worker has room."""

    def note_blocks(self, client: EngineClient) -> None:
        """Handle a worker's message about its blocks: a step of a prefill worker may have computed
        some, and a decode worker may have room for a request that stayed. Also called for a new
        prompt, as a prefill worker sends the blocks of a running step when the step ends.
        """
        if client.group == "decode":
            self._retry()
        elif client.group == "prefill":
            computing = (e for e in client.submissions if e.pauses and e.is_computing)
            for entry in islice(computing, _MAX_EARLY):
                self._fetch(entry, client)

    def take(self, client: EngineClient, message: Prefetched | Paused) -> None:
        """Handle a message of a worker about a request that the gateway does not move otherwise."""
        name = message.request_id
        if isinstance(message, Paused):
            if (entry := client.find(name)) is not None:
                self._hand_over(entry, client)
        elif self._fetching.pop(name, False) and name in self._coming:
            entry = self._coming[name][0]
            if isinstance(entry.stream, EngineClient) and entry.is_computing and entry.pauses:
                self._fetch(entry, entry.stream)

    def stay(self, entry: Submission, client: EngineClient) -> None:
        """Note that a worker decodes a request, which leaves later if the worker is a prefill
        worker and a decode worker has room."""
        if self._router.may_leave(entry, client):
            self._staying[entry.request.request_id] = entry

    def settle(self, entry: Submission, client: EngineClient) -> None:
        """Note that a request computes no prompt at ``client`` any more."""
        name = entry.request.request_id
        if name in self._coming and self._coming[name][1] is client:
            del self._coming[name]

    def drop(self, entry: Submission) -> None:
        """Forget a request that has ended or left its worker."""
        name = entry.request.request_id
        self._staying.pop(name, None)
        self._fetching.pop(name, None)
        if entry.stream is None:
            self._coming.pop(name, None)

    def change(self, client: EngineClient) -> None:
        """Handle a worker that has changed its step group: its decoding requests leave the prefill
        group, and stay in the decode group.
        """
        self.end(client.worker)
        for entry in client.submissions:
            self._staying.pop(entry.request.request_id, None)
            if not entry.is_computing:
                self.stay(entry, client)
        self._retry()

    def end(self, worker: str) -> None:
        """Forget a worker that was lost or is drained."""
        for name in [n for n, (_, target) in self._coming.items() if target.worker == worker]:
            del self._coming[name]
            self._fetching.pop(name, None)

    def _fetch(self, entry: Submission, source: EngineClient) -> None:
        name = entry.request.request_id
        if name in self._fetching:
            self._fetching[name] = True
            return
        if (target := self._target(entry)) is None:
            return
        self._coming[name] = entry, target
        self._fetching[name] = False
        target.prefetch(entry, source)

    def _hand_over(self, entry: Submission, source: EngineClient) -> None:
        """Move a paused request, or resume it if no decode worker has room."""
        name = entry.request.request_id
        target = self._target(entry) if source.group == "prefill" else None
        if target is None:
            source.stream.send(Pause(request_id=name, is_cancelled=True))
            self._coming.pop(name, None)
            self.stay(entry, source)
            return
        self._coming[name] = entry, target
        size = source.hello.kv_block_size if source.hello is not None else 0
        self._assignments.move(entry, target, size, source.worker)

    def _target(self, entry: Submission) -> EngineClient | None:
        """Return the decode worker that was chosen for a request, or choose one; None without one
        that has room."""
        known = self._coming.get(entry.request.request_id)
        if known is not None and known[1] in self._workers.ready:
            return known[1]
        coming = Counter[EngineClient]()
        for other, target in self._coming.values():
            coming[target] += other.num_known_tokens
        return self._router.pick_to_decode(entry, coming)

    def _retry(self) -> None:
        """Pause a request that stayed, if a decode worker has room for it now; try some."""
        for name, entry in tuple(islice(self._staying.items(), _MAX_RETRIED)):
            del self._staying[name]
            if self._target(entry) is not None:
                assert isinstance(entry.stream, EngineClient), "a staying request has a worker"
                entry.stream.stream.send(Pause(request_id=name))
                return
            self._staying[name] = entry  # after the others
