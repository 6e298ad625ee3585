"""Streams: the same as without, in pieces that follow the rules."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.core.tuning import GatewayTuning
from gateway.http.json_output import dump_json
from tests.gateway.fakes import counting_script, saying
from tests.gateway.sse_client import by_choice, parse_events, read_events
from tests.gateway.stack import Stack, complete, post, running_stack

CASES: list[dict[str, Any]] = [
    {"max_tokens": 12},
    {"max_tokens": 12, "n": 3, "logprobs": 2},
    {"max_tokens": 12, "prompt": ["hello", " world"], "n": 2},
    {"max_tokens": 12, "stop": ["lo;", "r w"], "logprobs": 0},
    {"max_tokens": 9, "echo": True, "logprobs": 1, "n": 2},
    {"max_tokens": 0, "echo": True, "logprobs": 1},
    {"max_tokens": 9, "echo": True},
    {"max_tokens": 9, "return_token_ids": True, "n": 2},
]


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_stream_adds_up_to_the_whole(stack: Stack, case: dict[str, Any], width: int) -> None:
    stack.engine.tokens_per_output = width
    fields = {"prompt": "hello", "seed": 3, **case}
    whole = complete(stack, **fields)
    chunks = read_events(stack, "/v1/completions", **fields)
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    choices = by_choice(chunks)
    assert sorted(choices) == [choice["index"] for choice in whole["choices"]]
    for expected in whole["choices"]:
        parts = choices[expected["index"]]
        assert "".join(part["text"] for part in parts) == expected["text"]
        assert parts[-1]["finish_reason"] == expected["finish_reason"]
        assert parts[-1]["stop_reason"] == expected["stop_reason"]
        assert all(part["text"] for part in parts[:-1])
        if expected["logprobs"] is not None:
            for name, values in expected["logprobs"].items():
                assert [v for part in parts for v in part["logprobs"][name]] == values
        if "token_ids" in expected:
            assert [v for part in parts for v in part["token_ids"]] == expected["token_ids"]
            assert parts[0]["prompt_token_ids"] == expected["prompt_token_ids"]


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_chunks_of_text_alone_are_written_as_all_others(
    stack: Stack, path: str, prompt: dict[str, Any]
) -> None:
    said = 'a "b"\\/\n\r\t\x00\x1f\x7f\u2028 h\u00e9 \U0001f600 <|user|>'
    stack.engine.script = saying(said, end=False)
    fields = {**prompt, "n": 2, "max_tokens": 60, "skip_special_tokens": False, "stream": True}
    answer = stack.http.post(path, json=fields).content
    events = [event.removeprefix(b"data: ") for event in answer.split(b"\n\n")][:-2]
    chunks = [json.loads(event) for event in events]
    assert [dump_json(chunk) for chunk in chunks] == events
    assert len({(*chunk, *chunk["choices"][0]) for chunk in chunks}) == 1  # in the same order
    for entries in by_choice(chunks).values():
        texts = [entry.get("text", entry.get("delta", {}).get("content", "")) for entry in entries]
        assert "".join(texts) == said


@pytest.mark.parametrize("logprobs", [{}, {"logprobs": True, "top_logprobs": 2}])
def test_a_chat_stream_adds_up_to_the_whole(stack: Stack, logprobs: dict[str, Any]) -> None:
    fields = {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 9,
        "n": 2,
        "seed": 4,
        **logprobs,
    }
    whole = post(stack, "/v1/chat/completions", **fields).json()
    chunks = read_events(stack, "/v1/chat/completions", **fields)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for index, parts in by_choice(chunks).items():
        expected = whole["choices"][index]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in part["delta"] for part in parts[1:])
        assert all(part["delta"].get("content") for part in parts[1:-1])
        text = "".join(part["delta"].get("content", "") for part in parts)
        assert text == expected["message"]["content"]
        if logprobs:
            entries = [e for part in parts[1:] for e in part["logprobs"]["content"]]
            assert entries == expected["logprobs"]["content"]


def test_characters_come_whole(stack: Stack) -> None:
    text = "é世界👩‍👧 end"
    stack.engine.script = saying(text.encode())
    chunks = read_events(stack, "/v1/completions", prompt="x", max_tokens=100)
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_usage_comes_last_where_asked_for(stack: Stack) -> None:
    fields: dict[str, Any] = {"prompt": ["hello", "x"], "n": 2, "max_tokens": 3}
    options = {"include_usage": True}
    chunks = read_events(stack, "/v1/completions", **fields, stream_options=options)
    assert chunks[-1]["choices"] == []
    usage = chunks[-1]["usage"]
    counts = [usage[f"{name}_tokens"] for name in ("prompt", "completion", "total")]
    assert counts == [2, 12, 14]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    plain = read_events(stack, "/v1/completions", **fields)
    assert all(chunk["choices"] and "usage" not in chunk for chunk in plain)


def test_continuous_usage_counts_up(stack: Stack) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = read_events(
        stack, "/v1/completions", prompt="hello", max_tokens=4, stream_options=options
    )
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 4


def test_an_error_after_the_first_byte_is_an_event(stack: Stack) -> None:
    stack.engine.step_s = 0.01
    fields = {"prompt": "x", "max_tokens": 400, "stream": True}
    with stack.http.stream("POST", "/v1/completions", json=fields) as answer:
        text = ""
        for piece in answer.iter_text():
            text += piece
            stack.engine.error = ("logits of the request are not finite", "nan_logits")
    chunks = parse_events(text)
    assert answer.status_code == 200
    assert chunks[-1]["error"] == {
        "message": "logits of the request are not finite",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }
    assert all("error" not in chunk for chunk in chunks[:-1])


def test_an_error_before_the_first_byte_has_a_status(stack: Stack) -> None:
    stack.engine.error = ("no room", "queue_full")
    response = post(stack, "/v1/completions", prompt="x", stream=True)
    assert response.status_code == 429
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert response.json()["error"]["code"] == "queue_full"


def test_a_comment_is_sent_in_silence() -> None:
    fields = {"prompt": "x", "max_tokens": 2, "stream": True}
    text = ""
    with running_stack(tuning=GatewayTuning(ping_after_s=0.05)) as stack:
        stack.engine.is_paused = True
        with stack.http.stream("POST", "/v1/completions", json=fields) as answer:
            for piece in answer.iter_text():
                text += piece
                stack.engine.is_paused = False
    assert text.startswith(": ping\n\n")
    assert by_choice(parse_events(text))


def test_tokens_that_are_ready_together_share_a_chunk(stack: Stack) -> None:
    stack.engine.tokens_per_output = 4
    chunks = read_events(stack, "/v1/completions", prompt="hello", max_tokens=8, logprobs=0)
    assert len(chunks) <= 2
    assert counting_script is stack.engine.script
