"""A cluster of threads that notes what its attention workers run in each step.

What gateways send can be given to the engines at certain steps, so that what a test says of the
steps does not depend on how fast its own threads are.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks.harness.engine_stream import TIMEOUT_S
from benchmarks.harness.serving_cluster import ThreadCluster, ThreadWorkerGroup
from cluster.config.cluster import ClusterConfig
from workers.process.context import WorkerContext
from workers.process.intake.commands import GatewayCommand
from workers.process.worker.worker import Worker
from workers.requests.request import TokenOutput
from workers.requests.step_header import StepHeader


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One step of the whole cluster."""

    header: StepHeader
    """What the leader granted."""
    tokens: dict[str, int]
    """New tokens by request, of all ranks."""


class RecordingWorker(Worker):
    """An attention worker that notes header and outputs of its steps."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.steps: list[tuple[StepHeader, list[TokenOutput]]] = []
        self.arrivals: deque[int] = deque()
        """See ``RecordedCluster.let_in``."""
        self._held: deque[GatewayCommand] = deque()

    def load(self, context: WorkerContext) -> dict[str, Any]:
        info = super().load(context)
        role = self.roles.attention
        assert role is not None
        take, step = role.inbox.take, role.engine.step

        def noted_step(header: StepHeader) -> list[TokenOutput]:
            outputs = step(header)
            self.steps.append((header, outputs))
            return outputs

        role.inbox.take = lambda: self._take_commands(take)  # type: ignore[method-assign]
        role.engine.step = noted_step  # type: ignore[method-assign]
        return info

    def _take_commands(self, take: Callable[[], list[GatewayCommand]]) -> list[GatewayCommand]:
        """Those whose step has come, after waiting for them; all others are held back."""
        if not self.arrivals:
            return take()
        due = []
        deadline = time.monotonic() + TIMEOUT_S
        self._held += take()
        while self.arrivals and self.arrivals[0] <= len(self.steps):
            while not self._held:
                assert time.monotonic() < deadline, "a command never came"
                time.sleep(0.001)
                self._held += take()
            due.append(self._held.popleft())
            self.arrivals.popleft()
        if not self.arrivals:
            due += self._held
            self._held.clear()
        return due


class RecordedCluster(ThreadCluster):
    """Serves as ``ThreadCluster`` does; ``steps`` records what happened."""

    def __init__(self, config: ClusterConfig) -> None:
        super().__init__(config, ThreadWorkerGroup(by_role={"attention": RecordingWorker}))

    def let_in(self, rank: int, num_steps: Iterable[int]) -> None:
        """After how many steps since the start the next commands are taken, one number for each.

        Requests, aborts and ends of streams are commands. The worker does not step beyond such a
        number before its command is there. What is beyond the list is taken at once.
        """
        worker = self.group.workers[f"attention-{rank}"]
        assert isinstance(worker, RecordingWorker)
        worker.arrivals = deque(num_steps)

    def steps(self) -> list[RecordedStep]:
        """All steps so far that every attention worker has run."""
        headers: dict[int, StepHeader] = {}
        tokens: defaultdict[int, dict[str, int]] = defaultdict(dict)
        num_ranks: defaultdict[int, int] = defaultdict(int)
        workers = [w for w in self.group.workers.values() if isinstance(w, RecordingWorker)]
        for worker in workers:
            for header, outputs in tuple(worker.steps):
                assert headers.setdefault(header.step, header) == header
                num_ranks[header.step] += 1
                for output in outputs:
                    tokens[header.step][output.request_id] = len(output.token_ids)
        return [
            RecordedStep(headers[step], tokens[step])
            for step in sorted(headers)
            if num_ranks[step] == len(workers)
        ]
