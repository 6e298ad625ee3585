"""Creates trace spans for steps of traced requests.

    step of a request                           has spans?
    with rows of its prompt                     yes
    its 1st, 2nd, 4th, 8th, .. decode step      yes, so that spans are spread over a long output
    after ``MAX_STEPS`` steps with spans        no

An attention worker proposes the parent spans of its requests, and the step header contains them.
Every expert worker, and the attention worker itself, then records one span for its part of the step
under each parent. Without traced requests, a step costs two checks of empty containers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from cluster.core.codec import SpanIdBytes
from cluster.tracing import names
from workers.requests.request import Request
from workers.requests.sequence import SequenceState
from workers.requests.step_header import StepHeader
from workers.requests.traced import MAX_TRACED

MAX_STEPS = 32
"""Maximum number of steps of a request that have spans, on one worker."""


class TracedRequests:
    """Traced requests of an engine, with the number of further steps that may have spans."""

    def __init__(self) -> None:
        self._num_left: dict[str, int] = {}

    def __bool__(self) -> bool:
        return bool(self._num_left)

    def add(self, request: Request) -> None:
        if request.step_parents is not None:
            self._num_left[request.request_id] = MAX_STEPS

    def forget(self, request_id: str) -> None:
        self._num_left.pop(request_id, None)

    def parents(self, expected: Iterable[SequenceState]) -> tuple[SpanIdBytes, ...]:
        """Parent spans for a step that will run these sequences; at most ``MAX_TRACED``."""
        parents: dict[SpanIdBytes, None] = {}
        for sequence in expected:
            if self._num_left.get(sequence.request.request_id, 0) > 0 and _has_spans(sequence):
                parents[_parent(sequence)] = None
                if len(parents) == MAX_TRACED:
                    break
        return tuple(parents)

    def count_step(self, header: StepHeader, rank: int, planned: Iterable[SequenceState]) -> None:
        """Count a step that ran these sequences on this rank."""
        parents = parents_of(header, rank)
        if parents:
            for name in {s.request.request_id for s in planned if _is_named(s, parents)}:
                self._num_left[name] -= 1


class RecordSpan(Protocol):
    """Type of ``TraceExport.record_child``. Times are from ``time.monotonic_ns``."""

    def __call__(
        self,
        parent: SpanIdBytes,
        name: str,
        began_ns: int,
        ended_ns: int,
        found: Mapping[str, Any],
    ) -> None: ...


class StepSpans:
    """``TimingSink`` that creates spans for steps with parents in the header. Data thread only.

    Args:
        record: records the spans.
        worker: name of this worker.
        rank: the attention rank whose parent spans are used. None for all ranks, on a worker that
            holds experts and thus computes for all.
    """

    def __init__(self, record: RecordSpan, worker: str, rank: int | None) -> None:
        self._record = record
        self._worker = worker
        self._rank = rank
        self._parents: tuple[SpanIdBytes, ...] = ()
        self._header: StepHeader | None = None
        self._ns: Counter[str] = Counter()
        self._step_ns = 0, 0

    def fork(self) -> StepSpans:
        return StepSpans(self._record, self._worker, self._rank)

    def begin_step(self, header: StepHeader) -> bool:
        if not header.parents:
            return False
        self._header, self._parents = header, parents_of(header, self._rank)
        self._ns.clear()
        return bool(self._parents)

    def add(self, name: str, start_ns: int, end_ns: int, labels: dict[str, Any]) -> None:
        if name == "step":
            self._step_ns = start_ns, end_ns
        else:
            # On a GPU, the laps of one bank stand for those of all.
            self._ns[name] += (end_ns - start_ns) * labels.get("num_banks", 1)

    def flush(self) -> None:
        header = self._header
        assert header is not None, "begin_step must be called first"
        seconds = {f"{names.SECONDS}.{name}": ns / 1e9 for name, ns in self._ns.items()}
        attributes = {
            names.WORKER: self._worker,
            names.STEP: header.step,
            names.GENERATION: header.generation,
            names.PLACEMENT_EPOCH: header.epoch,
            names.PREFILL_ROWS: header.prefill_rows,
            names.DECODE_ROWS: header.decode_rows,
            **seconds,
        }
        for parent in self._parents:
            self._record(parent, names.STEP_SPAN, *self._step_ns, attributes)


def parents_of(header: StepHeader, rank: int | None) -> tuple[SpanIdBytes, ...]:
    """Parent spans that the header has for one attention rank, or for all if ``rank`` is None."""
    return tuple(
        parent
        for asking, parents in header.parents
        if rank is None or asking == rank
        for parent in parents
    )


def _has_spans(sequence: SequenceState) -> bool:
    count = len(sequence.output)
    return not count or sequence.num_missing != 1 or count & (count - 1) == 0


def _parent(sequence: SequenceState) -> SpanIdBytes:
    parents = sequence.request.step_parents
    assert parents is not None, "only traced requests have parents"
    return parents.decode if sequence.output and sequence.num_missing == 1 else parents.prefill


def _is_named(sequence: SequenceState, parents: Iterable[SpanIdBytes]) -> bool:
    own = sequence.request.step_parents
    return own is not None and (own.prefill in parents or own.decode in parents)
