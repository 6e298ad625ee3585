"""Requests that wait while threads fill KV blocks for them from a peer or a lower tier."""

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
    """A job whose thread fills the KV blocks of ``fetch``."""

    fetch: Fetch
    transfer: Future[None]

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed but the thread has not ended; set by ``_take_ended``."""
        return self.deadline_s == math.inf


class FetchJobs(WaitingRequests):
    """Base of ``KvFetches`` and ``KvRestores``: finds and ends their jobs. Engine's thread only."""

    @property
    @abstractmethod
    def _running(self) -> Sequence[FetchJob]:
        """Jobs that have not been taken, oldest first."""

    def _job_filling(self, first_missing: BlockHash) -> FetchJob | None:
        """The job that fills this block, or None."""
        return next((job for job in self._running if job.fetch.lacks(first_missing)), None)

    def _wait_for(self, job: FetchJob | None, waiting: IntakeRequest) -> bool:
        """Let a request wait for a job; False if ``job`` is None or past its deadline."""
        if job is None or job.is_late:
            return False
        job.waiting.append(waiting)
        return True

    def _take_ended(self, store: KvTransferStore) -> tuple[list[FetchJob], list[IntakeRequest]]:
        """Remove and return ended jobs, and the requests whose wait is over, in order of jobs.

        The blocks of an ended job are stored in the pool. At a job's deadline its requests stop
        waiting. If the job has not started, it ends; else its blocks stay pinned until it ends.
        """
        now, ended, requests = self._clock(), list[FetchJob](), list[IntakeRequest]()
        for job in tuple(self._running):
            is_done = job.transfer.done() or (now >= job.deadline_s and job.transfer.cancel())
            if is_done:
                store.end(job.fetch)
                ended.append(job)
            if is_done or now >= job.deadline_s:
                requests += job.waiting
                job.waiting, job.deadline_s = [], math.inf
        return ended, requests
