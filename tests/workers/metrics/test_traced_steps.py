"""Which steps of a traced request have spans, and what is in one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec.structs import replace

from tests.workers.metrics.test_step_metrics import header_of
from workers.metrics.traced_steps import MAX_STEPS, StepSpans, TracedRequests
from workers.requests.request import Request, SamplingParams
from workers.requests.sequence import SequenceState
from workers.requests.step_header import StepHeader
from workers.requests.traced import MAX_TRACED, StepParents

PARENTS = StepParents(prefill=b"p" * 24, decode=b"d" * 24)
MS = 1_000_000


def sequence_of(name: str = "r", parents: StepParents | None = PARENTS) -> SequenceState:
    """One whose prompt is not computed."""
    request = Request(request_id=name, prompt=(1, 2), params=SamplingParams(), step_parents=parents)
    return SequenceState(request, choice=0, arrival=0, deadline=1.0)


def decoding(num_tokens: int, name: str = "r") -> SequenceState:
    """One with so many tokens of output, of which the newest is not computed."""
    sequence = sequence_of(name)
    sequence.output += range(num_tokens)
    sequence.num_computed = sequence.num_tokens - 1
    return sequence


def traced_of(*sequences: SequenceState) -> TracedRequests:
    traced = TracedRequests()
    for sequence in sequences:
        traced.add(sequence.request)
    return traced


def test_a_request_that_is_not_traced_asks_for_nothing() -> None:
    sequence = sequence_of(parents=None)
    traced = traced_of(sequence)
    assert not traced
    assert traced.parents([sequence]) == ()


def test_all_steps_of_the_prompt_have_spans_and_fewer_and_fewer_decodes() -> None:
    traced = traced_of(sequence_of())
    assert traced.parents([sequence_of()]) == (PARENTS.prefill,)
    asked = [n for n in range(1, 40) if traced.parents([decoding(n)]) == (PARENTS.decode,)]
    assert asked == [1, 2, 4, 8, 16, 32]


def test_output_that_is_computed_again_belongs_to_the_prompt() -> None:
    replayed = decoding(3)
    replayed.num_computed = 0
    assert traced_of(replayed).parents([replayed]) == (PARENTS.prefill,)


def test_a_step_has_spans_of_few_requests() -> None:
    parents = [StepParents(prefill=bytes([i]) * 24, decode=b"d" * 24) for i in range(9)]
    sequences = [sequence_of(str(i), own) for i, own in enumerate(parents)]
    found = traced_of(*sequences).parents([*sequences, *sequences])
    assert found == tuple(own.prefill for own in parents[:MAX_TRACED])


def test_a_request_has_a_bounded_number_of_steps_with_spans() -> None:
    sequence = sequence_of()
    traced = traced_of(sequence)
    header = replace(header_of(1), parents=((0, (PARENTS.prefill,)),))
    traced.count_step(header, 1, [sequence])  # it was another rank's
    for _ in range(MAX_STEPS):
        assert traced.parents([sequence])
        traced.count_step(header, 0, [sequence])
    assert not traced.parents([sequence])
    traced.forget("r")
    assert not traced


def test_steps_of_another_prompt_do_not_give_a_request_more_spans() -> None:
    """Prompts of a batch have the same span above their prefill, and so count each other's."""
    first, second = sequence_of("first"), sequence_of("second")
    traced = traced_of(first, second)
    header = replace(header_of(1), parents=((0, (PARENTS.prefill,)),))
    for _ in range(MAX_STEPS + 1):
        traced.count_step(header, 0, [first])
    assert not traced.parents([first])
    assert traced.parents([second])


class Kept:
    """``RecordSpan``."""

    def __init__(self) -> None:
        self.spans: list[tuple[bytes, str, int, int, Mapping[str, Any]]] = []

    def __call__(
        self, parent: bytes, name: str, began_ns: int, ended_ns: int, found: Mapping[str, Any]
    ) -> None:
        self.spans.append((parent, name, began_ns, ended_ns, found))


HEADER = replace(header_of(7, prefill_rows=5), parents=((0, (b"a" * 24,)), (1, (b"b" * 24,))))


def run(spans: StepSpans, header: StepHeader) -> bool:
    """A step with two exchanges."""
    if not spans.begin_step(header):
        return False
    for _ in range(2):
        spans.add("receive", 0, 2 * MS, {})
        spans.add("experts", 0, 3 * MS, {})
    spans.add("step", 10, 20 * MS, {})
    spans.flush()
    return True


def test_a_worker_of_experts_has_spans_of_all_ranks() -> None:
    kept = Kept()
    assert run(StepSpans(kept, "expert-0", None), HEADER)
    attributes = {
        "expertmesh.worker": "expert-0",
        "expertmesh.step": 7,
        "expertmesh.generation": 1,
        "expertmesh.placement_epoch": 0,
        "expertmesh.rows.prefill": 5,
        "expertmesh.rows.decode": 1,
        "expertmesh.seconds.receive": 0.004,
        "expertmesh.seconds.experts": 0.006,
    }
    assert kept.spans == [
        (parent, "expertmesh.step", 10, 20 * MS, attributes) for parent in (b"a" * 24, b"b" * 24)
    ]


def test_an_attention_worker_has_spans_of_its_own_requests() -> None:
    kept = Kept()
    spans = StepSpans(kept, "attention-1", 1)
    assert run(spans, HEADER)
    assert [parent for parent, *_ in kept.spans] == [b"b" * 24]
    assert not run(spans, replace(HEADER, parents=((0, (b"a" * 24,)),)))


def test_a_step_without_traced_rows_is_not_timed() -> None:
    kept = Kept()
    assert not run(StepSpans(kept, "expert-0", None), header_of(7))
    assert not kept.spans
