"""``POST /v1/completions``: forms of prompts, echo, log-probabilities, ends."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.http.json_output import dump_json
from tests.gateway.fakes import BACKEND, EOS, EOS_ID, MAX_MODEL_LEN, saying, tiny_tokenizer
from tests.gateway.stack import MODEL, WAIT_S, Stack, complete, post
from workers.requests.request import Grammar, GrammarKind

HELLO = BACKEND.encode("hello world").ids


def test_a_completion_has_all_its_fields(stack: Stack) -> None:
    answer = complete(stack, model=MODEL, prompt="hello world", max_tokens=4, seed=1)
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == MODEL
    assert isinstance(answer["created"], int)
    assert answer["system_fingerprint"].startswith("expertmesh-")
    (choice,) = answer["choices"]
    assert choice["index"] == 0
    assert choice["finish_reason"] == "length"
    assert choice["stop_reason"] is None
    assert choice["logprobs"] is None
    usage = {"prompt_tokens": len(HELLO), "completion_tokens": 4, "total_tokens": len(HELLO) + 4}
    assert answer["usage"] == {**usage, "prompt_tokens_details": {"cached_tokens": 0}}


def test_all_forms_of_a_prompt_say_the_same(stack: Stack) -> None:
    prompts: list[Any] = ["hello world", ["hello world"], HELLO, [HELLO]]
    texts = {complete(stack, prompt=p, seed=1)["choices"][0]["text"] for p in prompts}
    assert len(texts) == 1


def test_the_default_is_16_tokens(stack: Stack) -> None:
    assert complete(stack, prompt="a")["usage"]["completion_tokens"] == 16


def test_choices_of_a_batch_are_numbered_by_prompt(stack: Stack) -> None:
    answer = complete(stack, prompt=["hello", " world"], n=2, seed=1, max_tokens=3)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    alone = complete(stack, prompt=" world", n=2, seed=1, max_tokens=3)
    assert [c["text"] for c in answer["choices"][2:]] == [c["text"] for c in alone["choices"]]
    tokens = len(BACKEND.encode("hello").ids) + len(BACKEND.encode(" world").ids)
    assert answer["usage"] == {
        "prompt_tokens": tokens,
        "completion_tokens": 12,
        "total_tokens": tokens + 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_what_reaches_the_engine(stack: Stack) -> None:
    complete(stack, prompt=HELLO, temperature=0, top_k=-1, max_tokens=2, logit_bias={"3": 5})
    (request,) = stack.engine.requests
    assert request.prompt == tuple(HELLO)
    assert (request.params.temperature, request.params.top_k) == (0.0, 0)
    assert request.params.logit_bias == ((3, 5.0),)
    assert 0 < request.deadline_ms <= 1000 * WAIT_S


def test_what_reaches_the_engine_of_masks_and_scores(stack: Stack) -> None:
    complete(
        stack,
        prompt=HELLO,
        max_tokens=2,
        allowed_token_ids=[9, 3, 9],
        bad_words=["hello", "  world", "\n"],
        logprob_token_ids=[5, 4],
        prompt_logprobs=1,
        structured_outputs={"regex": "a+"},
    )
    params = stack.engine.requests[0].params
    assert params.allowed_token_ids == (3, 9)
    assert (params.logprobs, params.logprob_token_ids) == (2, (5, 4))
    assert params.prompt_logprobs == 1
    forms = ("hello", " hello", "world", " world", "\n")
    assert params.bad_words == tuple(tuple(BACKEND.encode(form).ids) for form in forms)
    assert params.grammar == Grammar(
        kind=GrammarKind.REGEX, text="a+", field="structured_outputs.regex"
    )


def test_echo_asks_for_the_larger_number_of_alternatives(stack: Stack) -> None:
    fields = {"prompt": HELLO, "max_tokens": 1, "echo": True}
    for logprobs, prompt_logprobs, expected in ((3, 1, 3), (1, 2, 2), (0, None, 0)):
        complete(stack, **fields, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
        assert stack.engine.requests[-1].params.prompt_logprobs == expected


def test_a_seed_is_drawn_where_none_is_given(stack: Stack) -> None:
    for _ in range(2):
        complete(stack, prompt=["a", "a"], max_tokens=1)
    assert len({request.params.seed for request in stack.engine.requests}) == 4


def test_log_probabilities(stack: Stack) -> None:
    answer = complete(stack, prompt="hello", max_tokens=6, logprobs=3, seed=2)
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    lengths = {len(logprobs[name]) for name in logprobs}
    assert lengths == {6}
    assert "".join(logprobs["tokens"]) == choice["text"]
    starts = logprobs["text_offset"]
    ends = [*starts[1:], len(choice["text"])]
    pieces = [choice["text"][a:b] for a, b in zip(starts, ends, strict=True)]
    assert pieces == logprobs["tokens"]
    assert min(v for top in logprobs["top_logprobs"] for v in top.values()) == -9999.0


def test_logprobs_0_reports_the_chosen_token_alone(stack: Stack) -> None:
    (choice,) = complete(stack, prompt="hello", max_tokens=2, logprobs=0)["choices"]
    logprobs = choice["logprobs"]
    for token, value, top in zip(
        logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True
    ):
        assert top == {token: value}


def test_echo_with_logprobs_scores_the_prompt(stack: Stack) -> None:
    (choice,) = complete(stack, prompt=HELLO, max_tokens=1, echo=True, logprobs=1)["choices"]
    assert choice["text"].startswith("hello world")
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(HELLO) + 1
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert None not in logprobs["token_logprobs"][1:]
    assert logprobs["text_offset"][-1] == len("hello world")


@pytest.mark.parametrize("n", [1, 2])
def test_max_tokens_0_scores_the_prompt_alone(stack: Stack, n: int) -> None:
    answer = complete(stack, prompt="hello world", max_tokens=0, echo=True, logprobs=1, n=n)
    for choice in answer["choices"]:
        assert choice["text"] == "hello world"
        assert choice["finish_reason"] == "length"
        assert len(choice["logprobs"]["tokens"]) == len(HELLO)
    assert answer["usage"]["completion_tokens"] == 0


def test_echo_gives_the_text_as_it_was_sent(stack: Stack) -> None:
    stack.engine.script = saying("hello")  # else a token drawn by chance may be one of the prompt's
    text = f"hello{EOS} wörld"
    (choice,) = complete(stack, prompt=text, max_tokens=1, echo=True, logprobs=0)["choices"]
    assert choice["text"].startswith(text)
    shown = choice["logprobs"]
    places = dict(zip(shown["tokens"], shown["text_offset"], strict=True))
    assert places[EOS] == len("hello")
    assert places[" w"] == len(f"hello{EOS}")


@pytest.mark.parametrize(
    ("fields", "text", "finish", "stop", "tokens"),
    [
        ({}, "hello world", "stop", None, 6),
        ({"skip_special_tokens": False}, "hello world", "stop", None, 6),
        (
            {"skip_special_tokens": False, "include_stop_str_in_output": True},
            *(f"hello world{EOS}", "stop", None, 6),
        ),
        ({"stop": " w"}, "hello", "stop", " w", 2),
        ({"stop": ["orl"]}, "hello w", "stop", "orl", 4),
        ({"stop": ["zz", "rl", "wor"]}, "hello ", "stop", "wor", 3),
        ({"stop": "orl", "include_stop_str_in_output": True}, "hello worl", "stop", "orl", 4),
        ({"stop": "wo", "include_stop_str_in_output": True}, "hello wo", "stop", "wo", 3),
        ({"stop": "never"}, "hello world", "stop", None, 6),
        ({"stop": "worldly"}, "hello world", "stop", None, 6),
        ({"stop": [], "max_tokens": 3}, "hello wor", "length", None, 3),
        ({"stop": "hello", "min_tokens": 1}, "hello world", "stop", None, 6),
        ({"stop_token_ids": [HELLO[1]]}, "hello", "stop", HELLO[1], 2),
        (
            {"stop_token_ids": [HELLO[1]], "include_stop_str_in_output": True},
            *("hello w", "stop", HELLO[1], 2),
        ),
    ],
)
@pytest.mark.parametrize("width", [1, 4])
def test_ends(
    stack: Stack,
    fields: dict[str, Any],
    text: str,
    finish: str,
    stop: str | int | None,
    tokens: int,
    width: int,
) -> None:
    stack.engine.script = saying("hello world")
    stack.engine.tokens_per_output = width
    answer = complete(stack, prompt="x", **{"max_tokens": 50, **fields})
    (choice,) = answer["choices"]
    assert choice["text"] == text
    assert (choice["finish_reason"], choice["stop_reason"]) == (finish, stop)
    assert answer["usage"]["completion_tokens"] == tokens


def test_a_stop_string_ends_the_work_in_the_engine(stack: Stack) -> None:
    stack.engine.script = saying("hello world" * 40, end=False)
    stack.engine.step_s = 0.01
    complete(stack, prompt="x", max_tokens=400, stop="w")
    stack.wait_for(lambda: not stack.engine.running, "the abort")
    assert stack.engine.aborts


def test_repeated_and_overshooting_outputs_are_dropped(stack: Stack) -> None:
    stack.engine.script = saying("hello world")
    stack.engine.repeat_outputs = True
    answer = complete(stack, prompt="x", max_tokens=50, logprobs=0)
    (choice,) = answer["choices"]
    assert choice["text"] == "hello world"
    assert len(choice["logprobs"]["tokens"]) == 6


def test_text_is_never_broken_inside(stack: Stack) -> None:
    stack.engine.script = saying("世界 é".encode())
    (choice,) = complete(stack, prompt="x", max_tokens=50)["choices"]
    assert choice["text"] == "世界 é"
    (cut,) = complete(stack, prompt="x", max_tokens=5)["choices"]
    assert cut["text"] == "世\ufffd"


def test_token_ids_are_returned_where_asked_for(stack: Stack) -> None:
    stack.engine.script = saying("hello world")
    answer = complete(stack, prompt="hello", max_tokens=50, return_token_ids=True)
    (choice,) = answer["choices"]
    assert choice["token_ids"] == [*HELLO, EOS_ID]
    assert choice["prompt_token_ids"] == BACKEND.encode("hello").ids


def test_a_prompt_may_fill_the_context(stack: Stack) -> None:
    answer = complete(stack, prompt=[1] * (MAX_MODEL_LEN - 2))
    assert answer["usage"]["total_tokens"] == MAX_MODEL_LEN


def test_tokenize_and_back(stack: Stack) -> None:
    answer = post(stack, "/tokenize", prompt="hello wörld", return_token_strs=True).json()
    ids = BACKEND.encode("hello wörld").ids
    assert answer["tokens"] == ids
    assert answer["count"] == len(ids)
    assert answer["max_model_len"] == MAX_MODEL_LEN
    assert answer["token_strs"][:2] == ["hello", " w"]
    assert post(stack, "/detokenize", tokens=ids).json() == {"prompt": "hello wörld"}
    assert post(stack, "/detokenize", tokens=[EOS_ID]).json() == {"prompt": EOS}
    plain = post(stack, "/tokenize", model=MODEL, prompt="").json()
    assert (plain["tokens"], plain["token_strs"]) == ([], None)


@pytest.mark.parametrize("strs", [False, True])
def test_tokenize_a_long_text(stack: Stack, strs: bool) -> None:
    answer = post(stack, "/tokenize", prompt='"wörld" ' * 2000, return_token_strs=strs)
    found = answer.json()
    assert answer.content == dump_json(found)
    ids = tuple(BACKEND.encode('"wörld" ' * 2000).ids)
    assert (found["count"], tuple(found["tokens"])) == (len(ids), ids)
    tokenizer = tiny_tokenizer()
    named = [tokenizer.token_text(i) for i in ids]
    assert found["token_strs"] == (named if strs else None)


def test_tokenize_a_conversation(stack: Stack) -> None:
    messages = [{"role": "user", "content": "hi"}]
    answer = post(stack, "/tokenize", messages=messages).json()
    assert answer["tokens"] == BACKEND.encode(f"<|user|>hi{EOS}\n<|assistant|>").ids
    closed = post(stack, "/tokenize", messages=messages, add_generation_prompt=False).json()
    assert closed["count"] == answer["count"] - 1


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, slice(-3, None)),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, slice(0, 3)),
        ({"truncate_prompt_tokens": 10**6}, slice(0, MAX_MODEL_LEN - 8)),
        ({"truncate_prompt_tokens": -1}, slice(8, None)),
        ({"truncate_prompt_tokens": None, "truncation_side": "left"}, slice(0, None)),
    ],
)
def test_prompts_are_cut_on_request(stack: Stack, fields: dict[str, Any], kept: slice) -> None:
    """No prompt is ever cut unasked; -1 leaves room for the output."""
    ids = [65 + i % 26 for i in range(MAX_MODEL_LEN)]
    prompt = ids if fields["truncate_prompt_tokens"] == -1 else ids[:-8]
    complete(stack, prompt=prompt, max_tokens=8, **fields)
    assert stack.engine.requests[-1].prompt == tuple(prompt[kept])
    text = tiny_tokenizer().decode(prompt)
    tokens = tiny_tokenizer().encode(text)
    if fields["truncate_prompt_tokens"] == 3:
        answer = complete(stack, prompt=text, max_tokens=1, echo=True, **fields)
        assert stack.engine.requests[-1].prompt == tokens[kept]
        assert answer["choices"][0]["text"].startswith(tiny_tokenizer().decode(tokens[kept]))


def test_a_client_may_name_its_answer(stack: Stack) -> None:
    assert complete(stack, prompt="x", request_id="mine-1")["id"] == "cmpl-mine-1"
    chat = {"messages": [{"role": "user", "content": "x"}], "request_id": "mine-1", "max_tokens": 2}
    response = post(stack, "/v1/chat/completions", **chat, stream=True)
    assert '"id":"chatcmpl-mine-1"' in response.text
    first, second = (request.request_id for request in stack.engine.requests)
    assert first != second
    refused = post(stack, "/v1/completions", prompt="x", request_id="not fit")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "request_id")


def test_health_has_aliases(stack: Stack) -> None:
    assert stack.http.get("/v2/health/live").content == b""
    assert stack.http.get("/v2/health/ready").json() == {"ready": True, "reasons": []}
