"""``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config.gateway import GatewaySection
from tests.gateway.fakes import BACKEND, EOS, MAX_MODEL_LEN, saying, tiny_tokenizer
from tests.gateway.stack import Stack, post, running_stack

_ENDLESS = "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"
USER = [{"role": "user", "content": "hi"}]


def _chat(stack: Stack, **fields: Any) -> dict[str, Any]:
    response = post(stack, "/v1/chat/completions", **{"messages": USER, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_a_chat_answer_has_all_its_fields(stack: Stack) -> None:
    stack.engine.script = saying("hello world")
    answer = _chat(stack)
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == "hello world"
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 6


def test_messages_go_through_the_template(stack: Stack) -> None:
    parts = [{"type": "text", "text": "hi"}]
    _chat(stack, messages=[{"role": "system", "content": "be"}, {"role": "user", "content": parts}])
    (request,) = stack.engine.requests
    expected = f"<|system|>be{EOS}\n<|user|>hi{EOS}\n<|assistant|>"
    assert request.prompt == tuple(BACKEND.encode(expected).ids)


def test_the_default_is_what_is_left_of_the_context(stack: Stack) -> None:
    answer = _chat(stack)
    assert answer["usage"]["total_tokens"] == MAX_MODEL_LEN
    assert answer["choices"][0]["finish_reason"] == "length"


def test_max_completion_tokens_wins(stack: Stack) -> None:
    answer = _chat(stack, max_tokens=9, max_completion_tokens=2)
    assert answer["usage"]["completion_tokens"] == 2


def test_log_probabilities_have_bytes(stack: Stack) -> None:
    stack.engine.script = saying("é".encode())
    (choice,) = _chat(stack, logprobs=True, top_logprobs=2)["choices"]
    entries = choice["logprobs"]["content"]
    exact = bytes(byte for entry in entries[:-1] for byte in entry["bytes"])
    assert exact.decode() == "é" == choice["message"]["content"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)
    assert entries[0]["token"] == "\ufffd"
    (plain,) = _chat(stack, logprobs=True)["choices"]
    assert all(entry["top_logprobs"] == [] for entry in plain["logprobs"]["content"])


def test_token_ids_where_asked_for(stack: Stack) -> None:
    stack.engine.script = saying("hello", end=False)
    answer = _chat(stack, return_token_ids=True)
    assert answer["choices"][0]["token_ids"] == BACKEND.encode("hello").ids
    assert answer["prompt_token_ids"] == list(stack.engine.requests[0].prompt)


def test_the_final_message_can_be_continued(stack: Stack) -> None:
    messages = [*USER, {"role": "assistant", "content": "Well"}]
    _chat(stack, messages=messages, continue_final_message=True, max_tokens=1)
    (request,) = stack.engine.requests
    expected = f"<|user|>hi{EOS}\n<|assistant|>Well"
    assert request.prompt == tuple(BACKEND.encode(expected).ids)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 100_000}]}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": MAX_MODEL_LEN}, "max_completion_tokens"),
        ({"echo": True}, "echo"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ],
)
def test_bad_conversations(stack: Stack, fields: dict[str, Any], param: str) -> None:
    response = post(stack, "/v1/chat/completions", **{"messages": USER, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not stack.engine.requests


def test_a_template_of_the_client_s_needs_trust(stack: Stack) -> None:
    fields = {"messages": USER, "chat_template": "{{ messages[0].content }}!{{ eos_token }}"}
    for path in ("/v1/chat/completions", "/tokenize"):
        response = post(stack, path, **fields)
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("unsupported_parameter", "chat_template")
        assert "--trust-request-chat-template" in error["message"]
    section = GatewaySection(trust_request_chat_template=True)
    with running_stack(section) as trusting:
        _chat(trusting, **fields, max_tokens=1)
        assert trusting.engine.requests[0].prompt == tuple(BACKEND.encode(f"hi!{EOS}").ids)
        tokens = post(trusting, "/tokenize", **fields).json()["tokens"]
        assert tokens == BACKEND.encode(f"hi!{EOS}").ids
        for wrong in ("{% if %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}", _ENDLESS, ""):
            response = post(trusting, "/v1/chat/completions", messages=USER, chat_template=wrong)
            assert response.status_code == 400
            error = response.json()["error"]
            assert (error["code"], error["param"]) == ("invalid_value", "chat_template")
            assert error["message"].startswith("chat_template")


def test_without_a_template_there_is_no_chat() -> None:
    with running_stack(tokenizer=tiny_tokenizer(template=None)) as stack:
        for path in ("/v1/chat/completions", "/tokenize"):
            response = post(stack, path, messages=USER)
            assert response.status_code == 400
            assert "chat template" in response.json()["error"]["message"]
        assert post(stack, "/v1/completions", prompt="x").status_code == 200


def test_without_a_tokenizer_there_are_token_ids_only() -> None:
    with running_stack(has_tokenizer=False) as stack:
        refused: list[tuple[str, dict[str, Any]]] = [
            ("/v1/completions", {"prompt": "x"}),
            ("/v1/completions", {"prompt": [1], "stop": "x"}),
            ("/v1/completions", {"prompt": [1], "bad_words": ["x"]}),
            ("/v1/completions", {"prompt": [1], "response_format": {"type": "json_object"}}),
            ("/v1/chat/completions", {"messages": USER}),
            ("/tokenize", {"prompt": "x"}),
            ("/detokenize", {"tokens": [1]}),
        ]
        for path, body in refused:
            response = post(stack, path, **body)
            assert response.status_code == 400
            assert "no tokenizer" in response.json()["error"]["message"]
        fields: dict[str, Any] = {
            "prompt": [1, 2],
            "max_tokens": 3,
            "return_token_ids": True,
            "logprobs": 1,
        }
        (choice,) = post(stack, "/v1/completions", **fields).json()["choices"]
        assert len(choice["token_ids"]) == 3
        assert choice["text"] == ""
        assert choice["logprobs"]["tokens"][0].startswith("token_id:")
