"""Requests and step outputs are the same on both ends of the engine stream."""

from __future__ import annotations

import contextlib
import random

import msgspec
import pytest

from cluster.core.errors import ProtocolError
from workers.requests.block_hash import KvEvents
from workers.requests.inspection import InspectionParams, NamedArray, Pooling, RouterShape
from workers.requests.prompt_embeds import PromptEmbeds
from workers.requests.request import (
    FinishReason,
    Grammar,
    GrammarKind,
    PromptLogprobs,
    Queued,
    Request,
    SamplingParams,
    SoloStage,
    SoloStep,
    StepOutput,
    Timings,
    TokenLogprob,
    TokenOutput,
)
from workers.requests.stream_handshake import HELLO, Hello
from workers.requests.wire import (
    ENGINE_HELLO,
    FROM_ENGINE,
    TO_ENGINE,
    Abort,
    EngineHello,
    FromEngine,
    KeepCopy,
    KvResync,
    Pause,
    Paused,
    Ping,
    ToEngine,
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
            logprob_token_ids=(4, 5),
            allowed_token_ids=(4, 5, 6),
            bad_words=((4,), (5, 6)),
            grammar=Grammar(kind=GrammarKind.REGEX, text="[a-z]+", field="guided_regex"),
        ),
        n=2,
        attempt=1,
        output_so_far=((4, 5), ()),
        closed_choices=(1,),
        num_deaths=2,
        deadline_ms=1234,
        priority=-3,
        cache_salt="tenant é",
        inspection=InspectionParams(
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
    assert TO_ENGINE.decode(TO_ENGINE.encode(request)) == request


def test_log_probabilities_of_a_long_prompt_are_decoded_in_short_pieces() -> None:
    entry = TokenLogprob(
        token_id=4, logprob=-0.5, rank=2, top_ids=(7, 4), top_logprobs=(-0.25, -0.5)
    )
    entries = [None, *[entry] * 1000]
    scores = PromptLogprobs.of(entries)
    assert scores.entries() == entries
    assert max(map(len, scores.pieces)) < 2 * len(scores.pieces[0])
    assert len(scores.pieces) == 4
    with pytest.raises(ProtocolError, match="log-probabilities"):
        PromptLogprobs(pieces=(b"\xc1",)).entries()


def test_copies_to_keep_survive_the_wire() -> None:
    copy = KeepCopy(
        source="attention-1",
        names=bytes(range(64)),
        num_prompt=1,
        tenant="t",
        session="s",
        cache_ttl_s=3.5,
        priority=-2,
        may_outlive=False,
    )
    assert TO_ENGINE.decode(TO_ENGINE.encode(copy)) == copy
    assert copy.hashes == (bytes(range(32)), bytes(range(32, 64)))


@pytest.mark.parametrize("num_bytes", [0, 31, 65])
def test_names_that_are_no_hashes_are_refused(num_bytes: int) -> None:
    whole = TO_ENGINE.encode(KeepCopy(source="a", names=bytes(32), num_prompt=0))
    broken = msgspec.msgpack.decode(whole)
    broken[2] = bytes(num_bytes)
    with pytest.raises(ProtocolError, match=f"hashes of 32 bytes, not {num_bytes}"):
        TO_ENGINE.decode(msgspec.msgpack.encode(broken))


@pytest.mark.parametrize(
    ("session", "cache_ttl_s", "is_kept"),
    [
        ("", None, False),
        ("s", None, True),
        ("", 0.0, False),
        ("s", 0.0, False),
        ("", 9.0, True),
        ("s", 9.0, True),
    ],
)
def test_blocks_are_wanted_later_if_a_request_says_so(
    session: str, cache_ttl_s: float | None, is_kept: bool
) -> None:
    params = SamplingParams()
    request = Request(
        request_id="r", prompt=(1,), params=params, session=session, cache_ttl_s=cache_ttl_s
    )
    assert request.is_retained is is_kept


def test_unset_logprobs_stay_unset() -> None:
    request = Request(request_id="r", prompt=(1,), params=SamplingParams())
    assert TO_ENGINE.decode(TO_ENGINE.encode(request)) == request


def test_step_output_survives_the_wire() -> None:
    entry = TokenLogprob(
        token_id=5, logprob=-0.5, rank=1, top_ids=(5, 6), top_logprobs=(-0.5, -1.5)
    )
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
                prompt_logprobs=PromptLogprobs.of((None, entry)),
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
    )
    assert FROM_ENGINE.decode(FROM_ENGINE.encode(step)) == step


def test_kv_events_survive_the_wire() -> None:
    events = KvEvents(number=7, is_whole=True, stored=(b"12345678", b"abcdefgh"), removed=())
    assert FROM_ENGINE.decode(FROM_ENGINE.encode(events)) == events
    change = KvEvents(number=8, removed=(b"12345678",))
    assert FROM_ENGINE.decode(FROM_ENGINE.encode(change)) == change


@pytest.mark.parametrize(
    "message",
    [
        Abort(request_id="r"),
        Abort(request_id="r", choices=(0, 2)),
        Ping(number=7),
        Pause(request_id="r", num_tokens=17),
        Pause(request_id="r", is_cancelled=True),
        KvResync(),
        SoloStep(request_id="r", attempt=1, stage=SoloStage.OVER),
    ],
    ids=repr,
)
def test_a_gateways_small_messages_survive_the_wire(message: ToEngine) -> None:
    assert TO_ENGINE.decode(TO_ENGINE.encode(message)) == message


@pytest.mark.parametrize(
    "message",
    [
        Ping(number=7),
        SoloStep(request_id="r", attempt=1),
        Queued(request_id="r", attempt=1),
        Paused(request_id="r"),
    ],
    ids=repr,
)
def test_a_workers_small_messages_survive_the_wire(message: FromEngine) -> None:
    assert FROM_ENGINE.decode(FROM_ENGINE.encode(message)) == message


FACTS = EngineHello(
    worker="attention-0",
    proof="p",
    generation=3,
    max_model_len=64,
    vocab_size=32,
    eos_token_ids=(1, 2),
    max_kv_tokens=128,
    dtype="float32",
    model_type="olmoe",
    hidden_size=8,
    num_layers=1,
    num_attention_layers=1,
    num_heads=1,
    labels=("good", "bad"),
    pad_token_id=0,
    problem_type="single_label_classification",
    banks=(RouterShape(name="mlp:0", num_experts=8, top_k=2, aux_copies=1),),
    kv_block_size=16,
    kv_length_matters_above=48,
)


def test_the_hello_survives_the_wire() -> None:
    assert ENGINE_HELLO.decode(ENGINE_HELLO.encode(FACTS)) == FACTS


REQUEST = Request(request_id="r", prompt=(1, 2), params=SamplingParams())


def spoiled(message: ToEngine, path: tuple[int, ...], value: object) -> bytes:
    """The message's bytes with another value at one place."""
    body = target = msgspec.msgpack.decode(TO_ENGINE.encode(message))
    for place in path[:-1]:
        target = target[place]
    target[path[-1]] = value
    return msgspec.msgpack.encode(body)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\xc0",
        b"\x90",
        b"\x91\xa7Nothing",
        b"\x81\xa4ping\x07",
        b"\x0a\x08\x0a\x06secret",
        b"\x91" * 100_000,
        b"\x92\xa5Abort\xdd\xff\xff\xff\xff",
        b"\x93\xa7Request\xa1r\xdd\xff\xff\xff\xff",
        TO_ENGINE.encode(Ping(number=1)) + b"\x00",
        HELLO.encode(Hello(name="g")),
        spoiled(Ping(number=1), (0,), "StepOutput"),
        spoiled(Ping(number=1), (1,), "1"),
        spoiled(Ping(number=1), (1,), True),
        spoiled(Abort(request_id="r"), (1,), 5),
        spoiled(Abort(request_id="r"), (2,), [0.5]),
        spoiled(REQUEST, (1,), None),
        spoiled(REQUEST, (2,), "tokens"),
        spoiled(REQUEST, (2, 0), -1),
        spoiled(REQUEST, (2, 0), 1 << 32),
        spoiled(REQUEST, (2, 0), 1.0),
        spoiled(REQUEST, (3,), {}),
        spoiled(REQUEST, (3, 0), -1),
        spoiled(REQUEST, (3, 2), "warm"),
        spoiled(REQUEST, (3, 18), ["prose", "text", "field"]),
        spoiled(REQUEST, (14,), [0, b""]),
        msgspec.msgpack.encode([*msgspec.msgpack.decode(TO_ENGINE.encode(Ping(number=1))), 1]),
    ],
    ids=lambda data: repr(data[:40]),
)
def test_what_is_no_message_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="not a message to an engine"):
        TO_ENGINE.decode(data)


def test_random_bytes_never_raise_anything_else() -> None:
    draw = random.Random(1)
    good = TO_ENGINE.encode(REQUEST)
    for _ in range(2000):
        data = bytearray(good)
        for _ in range(draw.randint(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        with contextlib.suppress(ProtocolError):
            TO_ENGINE.decode(bytes(data))
