"""Ranges, limits and defaults of a call."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from cluster.config.gateway import GatewaySection
from cluster.core.errors import ContextLengthError, RequestError
from gateway.calls.request_maker import complete_requests
from gateway.calls.tenant_queues import CallDemand
from gateway.calls.validate import check_token_ids, make_requests
from gateway.core.call import CallKind, ChatInput, GenerateCall
from gateway.core.field_checks import check_fields
from gateway.core.model import ModelFacts
from workers.requests.request import Request

LIMITS = GatewaySection()
MODEL = ModelFacts(name="tiny", max_model_len=100, vocab_size=50, max_kv_tokens=80)
PLAIN = GenerateCall(kind=CallKind.COMPLETION, prompts=("x",))
CHAT = GenerateCall(kind=CallKind.CHAT, chat=ChatInput(messages=({"role": "user"},)))


def _check(**values: Any) -> None:
    check_fields(dataclasses.replace(PLAIN, **values), LIMITS)


def _finish(
    fields: GenerateCall, *ids: tuple[int, ...], model: ModelFacts = MODEL
) -> list[Request]:
    seeds = iter(range(1000, 2000))
    return make_requests(fields, ids, model, lambda: next(seeds))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 17),
        ("n", 1_000_000),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("min_tokens", -1),
        ("temperature", -0.1),
        ("temperature", 100.5),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("top_k", -2),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 2.1),
        ("logit_bias", ((1, 100.5),)),
        ("logit_bias", ((1, math.nan),)),
        ("logit_bias", tuple((i, 0.0) for i in range(1025))),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
        ("stop", ("",)),
        ("stop", tuple("abcdefghijklmnopq")),
        ("stop", ("x",) * 1000),
        ("stop", ("x" * 257,)),
        ("stop_token_ids", tuple(range(1025))),
        ("logprobs", -1),
        ("logprobs", 21),
        ("cache_salt", ""),
        ("cache_salt", "x" * 257),
        ("session_id", ""),
        ("session_id", "x" * 257),
        ("prompt_cache_key", ""),
        ("prompt_cache_key", "x" * 257),
        ("cache_ttl", -0.5),
        ("cache_ttl", 3600.5),
        ("cache_ttl", math.inf),
        ("cache_ttl", math.nan),
    ],
)
def test_values_out_of_range_name_the_field(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name) as caught:
        _check(**{name: value})
    assert caught.value.param == name
    assert caught.value.code == "invalid_value"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 16),
        ("max_tokens", 1),
        ("temperature", 0),
        ("temperature", 100.0),
        ("top_p", 1.0),
        ("top_k", -1),
        ("top_k", 10**9),
        ("min_p", 0.0),
        ("repetition_penalty", 2),
        ("seed", -(2**63)),
        ("logprobs", 0),
        ("logprobs", 20),
        ("stop", ("x" * 256,) * 16),
        ("logit_bias", ((1, -100.0), (2, 100.0))),
        ("cache_salt", "x" * 256),
        ("session_id", "x" * 256),
        ("prompt_cache_key", "x" * 256),
        ("cache_ttl", 0),
        ("cache_ttl", 3600.0),
    ],
)
def test_values_at_the_edge_are_fine(name: str, value: Any) -> None:
    _check(**{name: value})


@pytest.mark.parametrize(
    ("prompts", "n", "param"),
    [
        ((), 1, "prompt"),
        (("",), 1, "prompt"),
        (("a", ""), 1, "prompt"),
        (((),), 1, "prompt"),
        (("a",) * 257, 1, "prompt"),
        (("a",) * 256, 3, "n"),
    ],
)
def test_batches_have_limits(prompts: Any, n: int, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        _check(prompts=prompts, n=n)
    assert caught.value.param == param


def test_max_tokens_0_is_for_echo() -> None:
    _check(max_tokens=0, echo=True)
    requests = _finish(dataclasses.replace(PLAIN, max_tokens=0, echo=True, logprobs=1), (1,) * 80)
    assert requests[0].params.max_tokens == 0
    assert requests[0].params.prompt_logprobs == 1


def test_min_tokens_must_not_exceed_max_tokens() -> None:
    with pytest.raises(RequestError, match=r"min_tokens \(5\) must not exceed max_tokens \(4\)"):
        _check(min_tokens=5, max_tokens=4)


def test_min_tokens_needs_a_token_that_does_not_end_the_text() -> None:
    model = dataclasses.replace(MODEL, vocab_size=8, eos_token_ids=(7,))
    fields = dataclasses.replace(PLAIN, stop_token_ids=tuple(range(7)))
    _finish(fields, (1,), model=model)
    _finish(dataclasses.replace(fields, min_tokens=1, ignore_eos=True), (1,), model=model)
    with pytest.raises(RequestError, match="leave no token") as caught:
        _finish(dataclasses.replace(fields, min_tokens=1), (1,), model=model)
    assert caught.value.param == "stop_token_ids"


@pytest.mark.parametrize(
    ("chat", "param"),
    [
        (ChatInput(messages=()), "messages"),
        (
            ChatInput(messages=({},), continue_final_message=True, add_generation_prompt=True),
            "continue_final_message",
        ),
        (ChatInput(messages=({},), template_kwargs={"messages": 1}), "chat_template_kwargs"),
    ],
)
def test_conversations_that_cannot_be_rendered(chat: ChatInput, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_fields(dataclasses.replace(CHAT, chat=chat), LIMITS)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("name", "values", "ids"),
    [
        ("prompt", {}, (1, 50)),
        ("prompt", {}, (-1,)),
        ("prompt", {}, ()),
        ("stop_token_ids", {"stop_token_ids": (50,)}, (1,)),
        ("logit_bias", {"logit_bias": ((50, 1.0),)}, (1,)),
    ],
)
def test_token_ids_must_be_in_the_vocabulary(
    name: str, values: dict[str, Any], ids: tuple[int, ...]
) -> None:
    with pytest.raises(RequestError) as caught:
        _finish(dataclasses.replace(PLAIN, **values), ids)
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("values", "length", "param"),
    [
        ({"max_tokens": 21}, 60, "max_tokens"),
        ({"max_tokens": 10**30}, 1, "max_tokens"),
        ({"max_tokens": 1}, 80, "prompt"),
        ({}, 80, "prompt"),
        ({}, 101, "prompt"),
        ({"min_tokens": 21}, 60, "prompt"),
    ],
)
def test_prompt_and_output_must_fit(values: dict[str, Any], length: int, param: str) -> None:
    with pytest.raises(ContextLengthError, match="maximum context length") as caught:
        _finish(dataclasses.replace(PLAIN, **values), (1,) * length)
    assert caught.value.param == param
    assert caught.value.code == "context_length_exceeded"


def test_defaults_of_max_tokens() -> None:
    assert _finish(PLAIN, (1,) * 10)[0].params.max_tokens == 16
    assert _finish(PLAIN, (1,) * 70)[0].params.max_tokens == 10
    assert _finish(CHAT, (1,) * 10)[0].params.max_tokens == 70
    longer = dataclasses.replace(PLAIN, min_tokens=20)
    assert _finish(longer, (1,) * 10)[0].params.max_tokens == 20


def test_other_defaults_are_neutral() -> None:
    requests = _finish(PLAIN, (1, 2))
    params = requests[0].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.repetition_penalty, params.logprobs) == (1.0, None)
    assert PLAIN.skip_special_tokens
    assert PLAIN.num_sampled == 1


class _Sliced(tuple[int, ...]):
    """Token ids that can only be looked at in slices, and note how long these are."""

    lengths: list[int]

    def __getitem__(self, place: Any) -> Any:
        part = super().__getitem__(place)
        self.lengths.append(len(part))
        return part

    def __iter__(self) -> Any:
        raise AssertionError("a million ids in one go hold the interpreter lock for 20 ms")


@pytest.mark.parametrize("wrong", [-1, 50])
@pytest.mark.parametrize("place", [0, 65_535, 65_536, 199_999])
def test_a_million_token_ids_are_compared_in_slices(place: int, wrong: int) -> None:
    right = [7] * 200_000
    ids = _Sliced([*right[:place], wrong, *right[place + 1 :]])
    ids.lengths = []
    with pytest.raises(RequestError, match=rf"prompt: token id {wrong} is not in the vocabulary"):
        check_token_ids("prompt", ids, 50)
    assert max(ids.lengths) <= 65_536
    assert sum(ids.lengths) < place + 65_537
    ids = _Sliced(right)
    ids.lengths = []
    check_token_ids("prompt", ids, 50)
    assert sum(ids.lengths) == 200_000


def test_long_lists_are_made_once_for_all_prompts() -> None:
    requests = _finish(dataclasses.replace(PLAIN, allowed_token_ids=(3, 2)), (1,), (2,))
    first, second = (prompt.params.allowed_token_ids for prompt in requests)
    assert first == (2, 3)
    assert second is first


def test_seeds_are_drawn_for_each_prompt_unless_given() -> None:
    drawn = _finish(PLAIN, (1,), (2,))
    assert [prompt.params.seed for prompt in drawn] == [1000, 1001]
    given = _finish(dataclasses.replace(PLAIN, seed=0), (1,), (2,))
    assert [prompt.params.seed for prompt in given] == [0, 0]


def test_log_probabilities_are_bounded_in_all() -> None:
    roomy = dataclasses.replace(MODEL, max_model_len=100_000, max_kv_tokens=0)
    fields = dataclasses.replace(PLAIN, logprobs=20, n=16, max_tokens=20_000)
    with pytest.raises(RequestError, match="logprobs"):
        _finish(fields, (1,), model=roomy)


def test_requests_are_named_after_the_call() -> None:
    call = dataclasses.replace(PLAIN, n=2)
    requests = complete_requests(call, _finish(call, (1, 2), (3,)), "cmpl-1", "", None)
    assert [request.request_id for request in requests] == ["cmpl-1-0", "cmpl-1-1"]
    assert [request.prompt for request in requests] == [(1, 2), (3,)]
    need = CallDemand.of(requests)
    assert (need.num_requests, need.num_seats) == (2, 4)
    assert need.num_tokens == 3 + 4 * 16
