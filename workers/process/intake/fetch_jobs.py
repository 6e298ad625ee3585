"""Requests that wait while threads fill blocks for them: from a peer, or from a lower tier."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from workers.kv.transfer.store import Fetch, KvTransferStore
from workers.process.intake.intake_request import IntakeRequest
from workers.process.intake.waiting import Job, WaitingRequests
from workers.requests.block_hash import BlockHash


@dataclass(kw_only=True, slots=True, eq=False)
class FetchJob(Job):
    """Blocks that a thread fills."""

    fetch: Fetch
    transfer: Future[None]

    @property
    def is_late(self) -> bool:
        """Its time is over, though its thread has not ended."""
        return self.deadline_s == math.inf


class FetchJobs(WaitingRequests):
    """Jobs by the prefix that they fill. All methods belong to the engine's thread."""

    @property
    @abstractmethod
    def _running(self) -> Sequence[FetchJob]:
        """Jobs that have not been taken, oldest first."""

    def _with(self, first_missing: BlockHash) -> FetchJob | None:
        """The job that fills this block."""
        return next((job for job in self._running if job.fetch.lacks(first_missing)), None)

    def _wait_for(self, job: FetchJob | None, waiting: IntakeRequest) -> bool:
        """Let a request wait for a job; False where there is none, or it is late."""
        if job is None or job.is_late:
            return False
        job.waiting.append(waiting)
        return True

    def _take_ended(self, store: KvTransferStore) -> tuple[list[FetchJob], list[IntakeRequest]]:
        """Jobs that are over, and the requests that wait no more, in the order of their jobs.

        What a job has filled can be found from now on. Requests do not wait for a late job, whose
        blocks stay held until its thread ends; one without a thread yet does not begin any more.
        """
        now, ended, found = self._clock(), list[FetchJob](), list[IntakeRequest]()
        for job in tuple(self._running):
            is_done = job.transfer.done() or (now >= job.deadline_s and job.transfer.cancel())
            if is_done:
                store.end(job.fetch)
                ended.append(job)
            if is_done or now >= job.deadline_s:
                found += job.waiting
                job.waiting, job.deadline_s = [], math.inf
        return ended, found
