"""Expert side of captured steps: steps that run as CUDA graphs.

The step header gives the sizes of all messages of such a step beforehand.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from workers.cuda.step_graph import StepGraph, StepGraphCache
from workers.dispatch.device_slots import DeviceSlotChecker, SlotNotes
from workers.dispatch.recording import FixedTables, RecordingTransport
from workers.dispatch.row_serving import ExpertSide, ServedPlace, ServedStep, StaticServing
from workers.metrics.captured_laps import CapturedLaps
from workers.metrics.step_timer import StepTimer
from workers.requests.step_header import StepHeader
from workers.transport.transport import DataTransport


@dataclass(slots=True)
class CapturedServes:
    """Counts that each replay of a captured step (CUDA graph) adds on an expert rank."""

    notes: SlotNotes | None
    """Validity and counts of the slots; set at the end of the capture."""
    num_bytes: dict[str, int]
    """Bytes that each replay adds to ``ExpertCounters.num_bytes``."""
    laps: CapturedLaps


@dataclass(frozen=True, slots=True)
class _CapturedStep:
    graph: StepGraph
    served: CapturedServes


class CapturedServing:
    """Serves steps of one expert rank as CUDA graphs: captures a step, keeps it in a cache, and
    replays it."""

    def __init__(
        self, side: ExpertSide, transport: DataTransport, fixed: FixedTables, max_kept_rows: int
    ) -> None:
        """``fixed``: copies of lookup tables at fixed addresses, from which CUDA graphs read.

        ``max_kept_rows``: maximum total number of rows of the captured steps in the cache; a single
        step may have more.
        """
        self._side = side
        self._transport = transport
        self._fixed = fixed
        self._kept = StepGraphCache[_CapturedStep](max_kept_rows)
        self._step: ServedStep | None = None
        self._places: Sequence[ServedPlace] = ()

    @property
    def state(self) -> Hashable:
        """A value that changes when captured steps (CUDA graphs) become invalid, because tables or
        expert slots have moved in memory, or connections have changed."""
        versions = (bank.version for bank in self._side.slots)
        return self._fixed.version, *versions, self._transport.captured_state

    @staticmethod
    def shape(header: StepHeader, own: int = -1) -> Hashable:
        """Return the cache key of a captured step: the numbers of rows that this rank receives.

        ``own``: rank of a colocated worker, whose own rows do not count.
        """
        ranks, parts = header.grants.ranks, header.num_micro_batches
        if header.bucket:  # the number is the same for all ranks
            return ranks, parts, header.edge_rows(own, 0)
        counts = [list(header.edge_counts(part)) for part in range(parts)]
        if (position := header.grants.positions.get(own)) is not None:
            for one in counts:
                one[position] = 0
        return ranks, *map(tuple, counts)

    def begin_step(self, step: ServedStep, places: Sequence[ServedPlace]) -> None:
        """Begin a step. ``places``: all exchanges to serve, in order."""
        self._step, self._places = step, places

    def serve(self, first: int) -> int:
        """Serve all exchanges of the step by one replay; return their number.

        ``first`` must be 0. A step whose shape is not in the cache is captured first. Raises
        ``PeerLostError`` and ``GenerationChangedError``.
        """
        step = self._step
        assert step is not None, "begin_step was not called"
        assert first == 0, "a captured step is replayed as a whole"
        self._kept.keep_only(self.state)
        num_rows = sum(sum(granted.values()) for granted in step.granted)
        captured = self._kept.get(
            self.shape(step.header), num_rows, lambda pool: self._capture(step, pool)
        )
        captured.graph.replay()
        self.count(captured.served, step.timer)
        return len(self._places)

    def _capture(self, step: ServedStep, pool: Any) -> _CapturedStep:
        """Run a step once to compile kernels and allocate memory, then capture it."""
        self._compute(step, None)
        graph = StepGraph(self._side.device, pool)
        with graph.capture():
            served = self._compute(step, graph)
        return _CapturedStep(graph, served)

    def _compute(self, step: ServedStep, graph: StepGraph | None) -> CapturedServes:
        side = self._side
        recording = RecordingTransport(self._transport, side.device, side.activity, graph)
        serving = StaticServing(side, recording)
        with self.capturing(step, serving) as served:
            for place in self._places:
                serving.serve_place(place)
        return served

    @contextmanager
    def capturing(self, step: ServedStep, serving: StaticServing) -> Iterator[CapturedServes]:
        """Begin a step, and return a context in which ``serving`` captures it without counting.

        The context yields the counts that each replay of the captured step adds.
        """
        checker, counters = self._side.checker, self._side.counters
        assert isinstance(checker, DeviceSlotChecker)
        num_bytes = dict.fromkeys(counters.num_bytes, 0)
        checker.begin()
        served = CapturedServes(None, num_bytes, step.timer.capture(len(self._side.banks)))
        captured = replace(step, num_bytes=num_bytes, must_wait=False, is_measured=False)
        serving.begin_step(captured, ())
        yield served
        served.notes = checker.notes

    def count(self, captured: CapturedServes, timer: StepTimer) -> DeviceSlotChecker:
        """Count a replayed step: its bytes at once, its expert slots and laps at the end of the
        step.

        ``captured``: result of ``capturing`` for this step. Returns the checker that counts slots.
        """
        timer.replay(captured.laps)
        checker, counters = self._side.checker, self._side.counters
        assert isinstance(checker, DeviceSlotChecker)
        checker.notes = captured.notes
        for name, count in captured.num_bytes.items():
            counters.num_bytes[name] += count
        return checker
