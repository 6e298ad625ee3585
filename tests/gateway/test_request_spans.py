"""Spans made of notes, where no gateway is needed to tell what they must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cluster.spans import Span
from gateway.call import CallKind, CallPrompt, GenerateCall
from gateway.call_notes import CallNotes, ChoiceNotes, PromptNotes
from gateway.cluster_moments import ClusterMoments
from gateway.delta import Usage
from gateway.request_spans import MAX_PROMPTS, Clock, EndedRequest, request_span
from tests.gateway.fakes import TIMINGS, expert_entry
from workers.request import FinishReason, SamplingParams

DAY_NS = 1_700_000_000_000_000_000


def choice(finish: FinishReason | None = FinishReason.LENGTH) -> ChoiceNotes:
    """Its first token came 2 s after the request's beginning, its last one at 4 s."""
    return ChoiceNotes(
        first_token_s=102.0,
        last_token_s=104.0,
        first_timings=TIMINGS,
        last_timings=TIMINGS if finish else None,
        finish_reason=finish,
        token_ids=(1, 2),
    )


def prompt(*choices: ChoiceNotes, replays_s: Sequence[float] = ()) -> PromptNotes:
    """Notes on a prompt of the first worker."""
    return PromptNotes(
        worker="attention-0", cached_tokens=None, replays_s=replays_s, choices=choices
    )


def parts(
    *prompts: PromptNotes, error: str = "", moments: ClusterMoments | None = None
) -> Sequence[Span]:
    """The children of a request that began at 100 s and ended at 105 s."""
    call_prompt = CallPrompt(ids=(1,), text=None, params=SamplingParams(max_tokens=2))
    call = GenerateCall(
        kind=CallKind.COMPLETION,
        model="tiny",
        prompts=(call_prompt,) * len(prompts),
        n=1,
        stop=(),
        include_stop_str_in_output=False,
        skip_special_tokens=True,
        logprobs=None,
        prompt_logprobs=None,
        echo=False,
        token_ids_only=False,
        return_token_ids=False,
        priority=0,
        cache_salt="",
        return_tokens_as_token_ids=False,
    )
    notes = CallNotes(
        call=call,
        call_id="cmpl-1",
        started_s=100.0,
        admitted_s=101.0,
        heard_s=104.0,
        closed_s=105.0,
        usage=Usage(prompt_tokens=1, completion_tokens=2, cached_tokens=None),
        makes_text=True,
        prompts=prompts,
    )
    ended = EndedRequest(
        operation="text_completion",
        request_id="r",
        response_id=None,
        model="tiny",
        server={},
        clock=Clock(day_ns=DAY_NS, monotonic_s=100.0),
        ended_s=105.0,
        error=error,
        fields=None,
        notes=notes,
    )
    return request_span(ended, moments or ClusterMoments(), None).children


def seconds(span: Span) -> tuple[float, float]:
    """Since the request's beginning."""
    return (span.began_ns - DAY_NS) / 1e9, (span.ended_ns - DAY_NS) / 1e9


def test_parts_follow_each_other() -> None:
    found = {span.name: seconds(span) for span in parts(prompt(choice()))}
    assert found == {
        "expertmesh.tokenize": (0.0, 1.0),
        "expertmesh.queue": (1.0, 1.999),
        "expertmesh.prefill": (1.999, 2.0),
        "expertmesh.decode": (2.0, 4.0),
        "expertmesh.detokenize": (4.0, 5.0),
    }


def test_a_request_that_nobody_worked_on_waited() -> None:
    nothing = ChoiceNotes(
        first_token_s=None,
        last_token_s=None,
        first_timings=None,
        last_timings=None,
        finish_reason=None,
        token_ids=(),
    )
    found = {span.name: seconds(span) for span in parts(prompt(nothing), error="not_ready")}
    assert found == {"expertmesh.tokenize": (0.0, 1.0), "expertmesh.queue": (1.0, 5.0)}


def test_a_prompt_that_is_only_read_has_no_output() -> None:
    read = replace(choice(), first_token_s=None, last_token_s=None, first_timings=None)
    found = {span.name: seconds(span) for span in parts(prompt(read))}
    assert "expertmesh.decode" not in found
    assert found["expertmesh.queue"] == (1.0, 1.001)
    assert found["expertmesh.prefill"] == (1.001, 1.002)


def test_a_broken_off_output_is_decoded_to_the_end_of_the_request() -> None:
    decode = parts(prompt(choice(None), choice()), error="internal_error")[-1]
    assert (decode.name, seconds(decode)) == ("expertmesh.decode", (2.0, 5.0))


def test_events_are_in_the_order_of_time() -> None:
    moments = ClusterMoments()
    for when_s, state, epoch in ((50.0, "SERVING", 3), (103.0, "LOST", 4), (200.0, "LOST", 5)):
        worker = {**expert_entry(0), "state": state}
        moments.take({"placement_epoch": epoch, "workers": [worker]}, when_s)
    decode = parts(prompt(choice(), replays_s=(103.5,)), moments=moments)[-2]
    assert [event.name for event in decode.events] == [
        "first_token",
        "epoch_changed",
        "expert_worker_lost",
        "replayed",
    ]
    assert decode.attributes["expertmesh.placement_epoch"] == 3


def test_a_large_batch_tells_of_its_first_prompts() -> None:
    names = [span.name for span in parts(*[prompt(choice())] * (MAX_PROMPTS + 1))]
    assert names.count("expertmesh.decode") == MAX_PROMPTS
