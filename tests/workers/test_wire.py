"""Requests and step outputs are the same on both ends of the engine stream."""

from __future__ import annotations

from protos import engine_pb2 as pb
from workers.inspection import Inspection, NamedArray, Pooling
from workers.prefix_hash import KvEvents
from workers.prompt_embeds import PromptEmbeds
from workers.request import (
    FinishReason,
    Request,
    SamplingParams,
    StepOutput,
    Timings,
    TokenLogprob,
    TokenOutput,
)
from workers.wire import (
    kv_events_from_wire,
    kv_events_to_wire,
    request_from_wire,
    request_to_wire,
    step_from_wire,
    step_to_wire,
)


def test_request_with_everything_set_survives_the_wire() -> None:
    request = Request(
        request_id="r",
        prompt=(1, 2, 3),
        params=SamplingParams(
            max_tokens=7,
            min_tokens=2,
            temperature=0.3,
            top_p=0.9,
            top_k=5,
            min_p=0.1,
            repetition_penalty=1.2,
            frequency_penalty=-0.5,
            presence_penalty=0.25,
            logit_bias=((4, -100.0), (5, 1.5)),
            stop_token_ids=(9, 10),
            ignore_eos=True,
            seed=-(2**62),
            logprobs=0,
            prompt_logprobs=3,
        ),
        n=2,
        attempt=1,
        output_so_far=((4, 5), ()),
        closed_choices=(1,),
        num_deaths=2,
        deadline_ms=1234,
        priority=-3,
        cache_salt="tenant é",
        inspection=Inspection(
            logits=(0, 2),
            labels=(-100, 2, 3),
            embedding=Pooling.MEAN,
            hidden_states=True,
            router_logits=True,
            routes=True,
            attentions=True,
            aux=True,
        ),
        prompt_embeds=PromptEmbeds(2, b"x" * 24),
        kv_peer="attention-1",
    )
    message = pb.EngineRequest.FromString(request_to_wire(request).SerializeToString())
    assert request_from_wire(message) == request


def test_unset_logprobs_stay_unset() -> None:
    request = Request(request_id="r", prompt=(1,), params=SamplingParams())
    assert request_from_wire(request_to_wire(request)) == request


def test_step_output_survives_the_wire() -> None:
    entry = TokenLogprob(token_id=5, logprob=-0.5, rank=1, top=((5, -0.5), (6, -1.5)))
    step = StepOutput(
        outputs=(
            TokenOutput(request_id="a", attempt=0, choice=0, index=3, token_ids=(5,)),
            TokenOutput(request_id="a", attempt=0, choice=1, index=0, num_cached_tokens=0),
            TokenOutput(
                request_id="i",
                attempt=0,
                choice=0,
                index=0,
                arrays=(NamedArray(name="x", dtype="int32", shape=(2, 1), data=b"12345678"),),
            ),
            TokenOutput(
                request_id="b",
                attempt=2,
                choice=1,
                index=0,
                token_ids=(5,),
                logprobs=(entry,),
                prompt_logprobs=(None, entry),
                finish_reason=FinishReason.STOP,
                stop_token_id=0,
                timings=Timings(
                    first_dispatch_s=0.1,
                    first_token_s=0.2,
                    finished_s=0.3,
                    prefill_s=(0.1, 0.15),
                    preempted_s=(0.25,),
                ),
            ),
            TokenOutput(
                request_id="b",
                attempt=0,
                choice=0,
                index=0,
                class_logits=(0.5, -1.25, 3.0),
                finish_reason=FinishReason.LENGTH,
            ),
            TokenOutput(
                request_id="c",
                attempt=0,
                choice=0,
                index=0,
                finish_reason=FinishReason.ERROR,
                error="logits are not finite",
                error_code="internal_error",
            ),
        ),
        stats={"num_requests_running": 2.0},
    )
    assert step_from_wire(pb.EngineStep.FromString(step_to_wire(step).SerializeToString())) == step


def test_kv_events_survive_the_wire() -> None:
    events = KvEvents(number=7, is_whole=True, stored=(b"12345678", b"abcdefgh"), removed=())
    assert kv_events_from_wire(kv_events_to_wire(events)) == events
    change = KvEvents(number=8, removed=(b"12345678",))
    assert kv_events_from_wire(kv_events_to_wire(change)) == change
