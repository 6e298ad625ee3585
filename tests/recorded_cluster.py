"""A cluster of threads that notes what its attention workers run in each step."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from cluster.config import ClusterConfig
from tests.serving_cluster import RUNTIMES, ThreadCluster, ThreadWorkerGroup
from workers.attention_runtime import AttentionRuntime
from workers.dist.header import StepHeader
from workers.engine import Engine
from workers.request import TokenOutput


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """One step of the whole cluster."""

    header: StepHeader
    """What the leader granted."""
    tokens: dict[str, int]
    """New tokens by request, of all ranks."""


class RecordingRuntime(AttentionRuntime):
    """Notes header and outputs of its steps."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.steps: list[tuple[StepHeader, list[TokenOutput]]] = []

    def _step(self, engine: Engine, header: StepHeader) -> list[TokenOutput]:
        outputs = super()._step(engine, header)
        self.steps.append((header, outputs))
        return outputs


class RecordedCluster(ThreadCluster):
    """Serves as ``ThreadCluster`` does; ``steps`` tells what happened."""

    def __init__(self, config: ClusterConfig) -> None:
        super().__init__(config, ThreadWorkerGroup({**RUNTIMES, "attention": RecordingRuntime}))

    def steps(self) -> list[RecordedStep]:
        """All steps so far that every attention worker has run."""
        headers: dict[int, StepHeader] = {}
        tokens: defaultdict[int, dict[str, int]] = defaultdict(dict)
        num_ranks: defaultdict[int, int] = defaultdict(int)
        runtimes = [r for r in self.group.runtimes.values() if isinstance(r, RecordingRuntime)]
        for runtime in runtimes:
            for header, outputs in tuple(runtime.steps):
                assert headers.setdefault(header.step, header) == header
                num_ranks[header.step] += 1
                for output in outputs:
                    tokens[header.step][output.request_id] = len(output.token_ids)
        return [
            RecordedStep(headers[step], tokens[step])
            for step in sorted(headers)
            if num_ranks[step] == len(runtimes)
        ]
