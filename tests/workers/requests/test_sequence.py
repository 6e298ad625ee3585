"""The state of one choice: what is known, what is missing, and what its client gets when."""

from __future__ import annotations

import math
from typing import Any

from workers.requests.inspection import InspectionParams
from workers.requests.request import (
    MAX_TIMES,
    FinishReason,
    PromptLogprobs,
    Request,
    SamplingParams,
    TokenLogprob,
)
from workers.requests.sequence import NOT_FINITE, Ending, SequenceState, num_reusable

SCORING = SamplingParams(prompt_logprobs=1)


def make_request(params: SamplingParams | None = None, **values: Any) -> Request:
    return Request(request_id="r", prompt=(10, 11, 12), params=params or SamplingParams(), **values)


def make_sequence(
    params: SamplingParams | None = None, output: tuple[int, ...] = (), **values: Any
) -> SequenceState:
    return SequenceState(
        make_request(params), 0, 0, math.inf, received=100.0, output=list(output), **values
    )


def test_tokens_are_those_of_the_prompt_and_then_of_the_output() -> None:
    sequence = make_sequence(output=(20, 21))
    known = [10, 11, 12, 20, 21]
    for first in range(6):
        for last in range(first, 6):
            assert list(sequence.tokens(first, last)) == known[first:last]


def test_the_key_is_the_same_in_every_release() -> None:
    """A retry on another worker must choose the same copies of experts."""
    assert make_sequence().key == 5468251539297232032


def test_a_sequence_decodes_once_only_its_newest_output_is_missing() -> None:
    sequence = make_sequence()
    sequence.num_computed = 2
    assert (sequence.num_missing, sequence.is_decoding) == (1, False)  # the end of the prompt
    sequence.append(20)
    assert (sequence.num_missing, sequence.is_decoding) == (2, False)
    sequence.num_computed = 3
    assert (sequence.num_missing, sequence.is_decoding) == (1, True)


def test_times_are_noted_until_the_first_token_and_not_without_limit() -> None:
    sequence = make_sequence()
    for when in range(MAX_TIMES + 1):
        sequence.note_dispatch(when)
        sequence.note_preemption(when)
    assert sequence.prefills == sequence.preemptions == list(range(MAX_TIMES))
    sequence = make_sequence()
    sequence.note_dispatch(101.0)
    sequence.make_output(102.0, None, tokens=(20,))
    sequence.note_dispatch(103.0)
    assert sequence.prefills == [101.0]


def test_an_output_has_its_place_and_the_first_one_what_belongs_to_the_prompt() -> None:
    sequence = make_sequence(SCORING, num_cached_tokens=2)
    logprob = TokenLogprob(token_id=20, logprob=-0.5, rank=1)
    sequence.append(20)
    first = sequence.make_output(102.0, None, tokens=(20,), logprobs=(logprob,))
    assert (first.index, first.token_ids, first.logprobs) == (0, (20,), (logprob,))
    assert (first.num_cached_tokens, first.prompt_logprobs) == (2, PromptLogprobs.of((None,)))
    assert first.timings is not None
    sequence.append(21)
    second = sequence.make_output(103.0, None, tokens=(21,))
    assert (second.index, second.token_ids, second.logprobs) == (1, (21,), ())
    assert (second.num_cached_tokens, second.prompt_logprobs, second.timings) == (None,) * 3
    last = sequence.make_output(104.0, Ending(reason=FinishReason.ABORT))
    assert (last.index, last.token_ids, last.finish_reason) == (2, (), FinishReason.ABORT)
    assert last.timings is not None


def test_only_a_request_that_asks_for_scores_gets_them() -> None:
    sequence = make_sequence()
    assert sequence.make_output(102.0, None, tokens=(20,)).prompt_logprobs is None


def test_times_count_from_receipt() -> None:
    sequence = make_sequence()
    sequence.note_dispatch(101.0)
    sequence.note_dispatch(102.0)
    sequence.note_preemption(104.0)
    sequence.make_output(103.0, None, tokens=(20,))
    timings = sequence.make_output(108.0, Ending(reason=FinishReason.STOP), tokens=(21,)).timings
    assert timings is not None
    assert (timings.first_dispatch_s, timings.first_token_s, timings.finished_s) == (1.0, 3.0, 8.0)
    assert (timings.prefill_s, timings.preempted_s) == ((1.0, 2.0), (4.0,))


def test_a_sequence_that_fails_before_its_first_step_was_in_the_queue_till_then() -> None:
    timings = make_sequence().make_error(NOT_FINITE, 105.0).timings
    assert timings is not None
    assert (timings.first_dispatch_s, timings.first_token_s, timings.finished_s) == (5.0, 5.0, 5.0)


def test_what_must_be_computed_is_not_taken_from_a_cache() -> None:
    assert num_reusable(make_request()) == 2  # the last token's logits are needed
    assert num_reusable(make_request(SCORING)) == 0
    assert num_reusable(make_request(inspection=InspectionParams(logits=(1,)))) == 1


def test_a_sequence_that_resumes_reuses_all_but_its_newest_token() -> None:
    assert make_sequence().num_reusable == 2
    scoring = make_sequence(SCORING)
    assert scoring.num_reusable == 0
    scoring.append(20)  # the prompt was scored before
    assert scoring.num_reusable == 3
    inspected = SequenceState(
        make_request(inspection=InspectionParams(logits=(1,))), 0, 0, math.inf
    )
    assert inspected.num_reusable == 1
