"""HTTP and gRPC are two codecs of one call: the same request has the same outcome over both."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import grpc
import pytest

from protos import inference_pb2 as pb
from protos import types_pb2
from protos.inference_pb2_grpc import InferenceStub
from tests.conformance.test_openapi import TOOLS, USER
from tests.gateway.grpc.test_grpc import failure, request_of
from tests.gateway.stack import MODEL, WAIT_S, Stack

pytestmark = pytest.mark.heavy

PROMPT = "ROMEO:\nBut soft, what light"
BASE: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "return_token_ids": True}
SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
GOOD: dict[str, dict[str, Any]] = {
    "greedy": {"prompt": PROMPT},
    "token ids": {"prompt": [5, 6, 7, 8]},
    "sampled": {"prompt": PROMPT, "temperature": 1, "seed": 7, "top_p": 0.9, "n": 3},
    "masks": {"prompt": PROMPT, "temperature": 1, "seed": 7, "top_k": 5, "min_p": 0.01},
    "penalties": {
        "prompt": PROMPT,
        "repetition_penalty": 1.3,
        "frequency_penalty": 0.5,
        "presence_penalty": -0.5,
    },
    "logprobs": {"prompt": PROMPT, "logprobs": 3},
    "echo": {"prompt": PROMPT, "logprobs": 1, "echo": True, "max_tokens": 1},
    "prompt only": {"prompt": PROMPT, "logprobs": 0, "echo": True, "max_tokens": 0},
    "prompt logprobs": {"prompt": PROMPT, "prompt_logprobs": 2},
    "bias": {"prompt": PROMPT, "logit_bias": {"5": 100}},
    "stop string": {"prompt": PROMPT, "max_tokens": 200, "stop": ["e", "\n\n"]},
    "stop string kept": {
        "prompt": PROMPT,
        "max_tokens": 200,
        "stop": ["e"],
        "include_stop_str_in_output": True,
    },
    "stop token": {"prompt": PROMPT, "stop_token_ids": list(range(512)), "min_tokens": 2},
    "ignore eos": {"prompt": PROMPT, "max_tokens": 60, "ignore_eos": True},
    "allowed": {"prompt": PROMPT, "allowed_token_ids": [40, 41, 42]},
    "bad words": {"prompt": PROMPT, "bad_words": ["the", "light"]},
    "chosen logprobs": {"prompt": PROMPT, "logprob_token_ids": [5, 6, 7]},
    "cut left": {"prompt": PROMPT, "truncate_prompt_tokens": 3},
    "cut right": {"prompt": PROMPT, "truncate_prompt_tokens": 3, "truncation_side": "right"},
    "regex": {"prompt": PROMPT, "structured_outputs": {"regex": "[ab]{3}"}},
    "choice": {"prompt": PROMPT, "structured_outputs": {"choice": ["yes", "no"]}},
    "schema": {
        "prompt": PROMPT,
        "max_tokens": 40,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
    },
    "chat": {"messages": USER},
    "chat goes on": {
        "messages": [*USER, {"role": "assistant", "content": "I am"}],
        "continue_final_message": True,
    },
    "tools": {"messages": USER, "tools": TOOLS, "tool_choice": "required", "max_tokens": 200},
    "one tool": {
        "messages": USER,
        "tools": TOOLS,
        "tool_choice": {"type": "function", "function": {"name": "look_up"}},
        "parallel_tool_calls": False,
        "max_tokens": 200,
    },
    "tools that need not be called": {"messages": USER, "tools": TOOLS},
}
BEAMS: dict[str, dict[str, Any]] = {
    "beams": {"prompt": PROMPT, "n": 4},
    "one beam": {"prompt": PROMPT, "logprobs": 2},
    "the best of more": {"prompt": [5, 6, 7], "n": 2, "best_of": 6, "logprobs": 0},
    "longer ones": {
        "prompt": PROMPT,
        "n": 3,
        "length_penalty": 2.0,
        "early_stopping": "never",
        "stop_token_ids": list(range(60, 120)),
        "min_tokens": 2,
    },
    "shorter ones": {
        "prompt": PROMPT,
        "n": 3,
        "length_penalty": 0.0,
        "early_stopping": True,
        "stop_token_ids": list(range(60, 120)),
        "include_stop_str_in_output": True,
    },
    "echo": {"prompt": PROMPT, "n": 2, "echo": True},
    "chat": {"messages": USER, "n": 3, "temperature": 1},
}
CODES = grpc.StatusCode
INVALID, UNBUILT = CODES.INVALID_ARGUMENT, CODES.UNIMPLEMENTED
BAD: dict[str, tuple[dict[str, Any], grpc.StatusCode, int]] = {
    "empty prompt": ({"prompt": ""}, INVALID, 400),
    "unknown token": ({"prompt": [1024]}, INVALID, 400),
    "unknown model": ({"prompt": "x", "model": "other"}, CODES.NOT_FOUND, 404),
    "temperature": ({"prompt": "x", "temperature": -1}, INVALID, 400),
    "top_p": ({"prompt": "x", "top_p": 0}, INVALID, 400),
    "min_p": ({"prompt": "x", "min_p": 2}, INVALID, 400),
    "penalty": ({"prompt": "x", "repetition_penalty": 0}, INVALID, 400),
    "n": ({"prompt": "x", "n": 1000}, INVALID, 400),
    "best_of": ({"prompt": "x", "n": 3, "best_of": 2}, INVALID, 400),
    "chat best_of": ({"messages": USER, "best_of": 2}, UNBUILT, 400),
    "no tokens": ({"prompt": "x", "max_tokens": 0}, INVALID, 400),
    "too many tokens": ({"prompt": "x", "max_tokens": 5000}, INVALID, 400),
    "long prompt": ({"prompt": [5] * 5000}, INVALID, 400),
    "min_tokens": ({"prompt": "x", "min_tokens": 13}, INVALID, 400),
    "logprobs": ({"prompt": "x", "logprobs": 21}, INVALID, 400),
    "bias": ({"prompt": "x", "logit_bias": {"5": 101}}, INVALID, 400),
    "bias token": ({"prompt": "x", "logit_bias": {"5000": 1}}, INVALID, 400),
    "stop": ({"prompt": "x", "stop": [""]}, INVALID, 400),
    "stops": ({"prompt": "x", "stop": ["a"] * 17}, INVALID, 400),
    "allowed": ({"prompt": "x", "allowed_token_ids": []}, INVALID, 400),
    "cut": ({"prompt": "x", "truncate_prompt_tokens": 0}, INVALID, 400),
    "side": ({"prompt": "x", "truncation_side": "top"}, INVALID, 400),
    "salt": ({"prompt": "x", "cache_salt": ""}, INVALID, 400),
    "regex": ({"prompt": "x", "structured_outputs": {"regex": "(a"}}, INVALID, 400),
    "format": ({"prompt": "x", "response_format": {"type": "xml"}}, INVALID, 400),
    "tag": ({"prompt": "x", "response_format": {"type": "structural_tag"}}, UNBUILT, 400),
    "no beams": ({"prompt": "x", "length_penalty": 2.0}, INVALID, 400),
    "no messages": ({"messages": []}, INVALID, 400),
    "chat echo": ({"messages": USER, "echo": True}, UNBUILT, 400),
    "own template": ({"messages": USER, "chat_template": "x"}, UNBUILT, 400),
    "tool choice": ({"messages": USER, "tool_choice": "required"}, INVALID, 400),
    "tool schema": (
        {
            "messages": USER,
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": 5}}}],
        },
        INVALID,
        400,
    ),
    "tools and regex": (
        {"messages": USER, "tools": TOOLS, "structured_outputs": {"regex": "a"}},
        INVALID,
        400,
    ),
}
_OPTIONS = ("logprobs", "prompt_logprobs", "echo", "return_token_ids", "logprob_token_ids")
_OF_REQUEST = ("model", "priority", "cache_salt", "truncate_prompt_tokens", "truncation_side")
_OF_CHAT = ("add_generation_prompt", "continue_final_message", "chat_template")
_TEXT = json.dumps


def message_of(body: Mapping[str, Any]) -> dict[str, Any]:
    """An HTTP body as the plain data of a ``GenerateRequest``."""
    sampling: dict[str, Any] = {}
    message: dict[str, Any] = {"sampling_params": sampling, "output_options": {}}
    chat: dict[str, Any] = {}
    for name, value in body.items():
        if name == "prompt":
            is_text = isinstance(value, str)
            message["text" if is_text else "token_ids"] = value if is_text else {"ids": value}
        elif name in _OPTIONS:
            message["output_options"][name] = value
        elif name in _OF_REQUEST:
            message[name] = value
        elif name in ("messages", "parallel_tool_calls", *_OF_CHAT):
            chat[name] = value
        elif name == "tools":
            chat[name] = [_tool(tool["function"]) for tool in value]
        elif name == "tool_choice":
            is_name = isinstance(value, dict)
            chat["tool_name" if is_name else name] = value["function"]["name"] if is_name else value
        elif name == "allowed_token_ids":
            sampling[name] = {"ids": value}
        elif name == "response_format":
            sampling[name] = _format(value)
        elif name == "early_stopping":
            sampling[name] = str(value).lower()
        elif name == "structured_outputs":
            sampling[name] = _structured(value)
        else:
            sampling[name] = value
    return message | ({"messages": chat} if chat else {})


def _tool(function: Mapping[str, Any]) -> dict[str, Any]:
    return {**function, "parameters": _TEXT(function["parameters"])}


def _format(value: Mapping[str, Any]) -> dict[str, Any]:
    schema = value.get("json_schema")
    if schema is None:
        return dict(value)
    return {**value, "json_schema": {**schema, "schema": _TEXT(schema["schema"])}}


def _structured(value: Mapping[str, Any]) -> dict[str, Any]:
    return {"choice": {"texts": value["choice"]}} if "choice" in value else dict(value)


def path_of(body: Mapping[str, Any]) -> str:
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


@pytest.mark.parametrize("name", GOOD)
def test_good_requests(stack: Stack, stub: InferenceStub, name: str) -> None:
    body = {**BASE, **GOOD[name], "seed": 7}
    response = stack.http.post(path_of(body), json=body)
    assert response.status_code == 200, response.text
    over_http = response.json()
    answer = stub.Generate(request_of(**message_of(body)), timeout=WAIT_S)
    assert len(answer.choices) == len(over_http["choices"]) == body.get("n", 1)
    first = over_http["choices"][0]
    assert list(answer.prompt_token_ids) == first["prompt_token_ids"]
    for ours, theirs in zip(answer.choices, over_http["choices"], strict=True):
        same_choice(ours, theirs)
    same_prompt_logprobs(answer, over_http.get("prompt_logprobs", first.get("prompt_logprobs")))
    usage = over_http["usage"]
    counted = (answer.usage.prompt_tokens, answer.usage.completion_tokens)
    assert counted == (usage["prompt_tokens"], usage["completion_tokens"])

    chunks = list(stub.GenerateStream(request_of(**message_of(body)), timeout=WAIT_S))
    for choice in answer.choices:
        own = [chunk for chunk in chunks if chunk.choice_index == choice.index]
        assert [token for chunk in own for token in chunk.token_ids] == list(choice.token_ids)
        assert "".join(chunk.text for chunk in own) == choice.text
        assert own[-1].finish_info.reason == choice.finish_info.reason


@pytest.mark.parametrize("name", BEAMS)
def test_beam_searches(stack: Stack, stub: InferenceStub, name: str) -> None:
    body = {**BASE, "use_beam_search": True, **BEAMS[name]}
    response = stack.http.post(path_of(body), json=body)
    assert response.status_code == 200, response.text
    choices = response.json()["choices"]
    answer = stub.Generate(request_of(**message_of(body)), timeout=WAIT_S)
    assert len(answer.choices) == len(choices) == body.get("n", 1)
    for ours, theirs in zip(answer.choices, choices, strict=True):
        same_choice(ours, theirs)
        assert ours.beam_score == theirs["beam_score"]
    scores = [choice["beam_score"] for choice in choices]
    assert scores == sorted(scores, reverse=True)
    assert len({choice.text for choice in answer.choices}) == len(choices)


def test_beams_are_not_streamed(stack: Stack, stub: InferenceStub) -> None:
    body = {**BASE, "prompt": PROMPT, "use_beam_search": True}
    response = stack.http.post("/v1/completions", json={**body, "stream": True})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "use_beam_search")
    message = request_of(**message_of(body))
    code, text, _ = failure(lambda: list(stub.GenerateStream(message, timeout=WAIT_S)))
    assert (code, text) == (INVALID, error["message"])


def same_choice(ours: Any, theirs: dict[str, Any]) -> None:
    """One choice over gRPC and over HTTP."""
    message = theirs.get("message", {"content": theirs.get("text")})
    assert (ours.index, ours.text) == (theirs["index"], message["content"] or "")
    assert list(ours.token_ids) == theirs["token_ids"]
    calls = [(c.name, c.arguments) for c in ours.tool_calls]
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    assert calls == [(function["name"], function["arguments"]) for function in functions]
    reason = types_pb2.FinishReason.Name(ours.finish_info.reason)
    assert reason == f"FINISH_REASON_{theirs['finish_reason'].upper()}"
    kind = ours.finish_info.WhichOneof("stop_reason")
    assert (getattr(ours.finish_info, kind) if kind else None) == theirs["stop_reason"]
    logprobs = theirs["logprobs"]
    if logprobs is None:
        assert not ours.logprobs
        return
    values = [entry.logprob if entry.HasField("logprob") else None for entry in ours.logprobs]
    assert values == logprobs["token_logprobs"]
    assert [entry.token for entry in ours.logprobs] == logprobs["tokens"]
    assert [entry.text_offset for entry in ours.logprobs] == logprobs["text_offset"]
    tops = [{t.token: t.logprob for t in e.top_logprobs} or None for e in ours.logprobs]
    assert [None if top is None else set(top) for top in tops] == [
        None if top is None else set(top) for top in logprobs["top_logprobs"]
    ]


def same_prompt_logprobs(answer: Any, theirs: list[dict[str, Any] | None] | None) -> None:
    """Those of the prompt's tokens, by token."""
    assert len(answer.prompt_logprobs) == len(theirs or ())
    for entry, reported in zip(answer.prompt_logprobs, theirs or (), strict=True):
        assert entry.HasField("logprob") is (reported is not None)
        if reported is not None:
            assert reported[str(entry.token_id)]["logprob"] == entry.logprob


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(stack: Stack, stub: InferenceStub, name: str) -> None:
    fields, code, status = BAD[name]
    body = {**BASE, **fields}
    error, message = None, request_of(**message_of(body))
    for stream in (False, True):
        response = stack.http.post(path_of(body), json={**body, "stream": stream})
        assert response.status_code == status, response.text
        error = response.json()["error"]
    assert error is not None
    param, reported = error["param"], error["message"]
    if param == "prompt":  # the message has several fields for what is one over HTTP
        param = str(message.WhichOneof("input"))
        reported = re.sub("^prompt", param, reported)
    for call in (
        stub.Generate,
        lambda message, timeout: list(stub.GenerateStream(message, timeout)),
    ):
        got, text, details = failure(lambda call=call: call(message, timeout=WAIT_S))
        assert got is code
        assert details["ErrorInfo"].reason == error["code"]
        assert details["ErrorInfo"].domain == "expertmesh"
        assert details["RequestInfo"].request_id
        violations = details["BadRequest"].field_violations
        assert [v.field for v in violations] == [param]
        assert text == reported


def test_metadata_goes_both_ways(stack: Stack, stub: InferenceStub) -> None:
    message = request_of(**message_of({**BASE, "prompt": PROMPT, "seed": 7}))
    given = (("x-request-id", "mine-7"), ("x-priority", "-3"))
    call: Any = stub.GenerateStream(message, timeout=WAIT_S, metadata=given)
    early = dict(call.initial_metadata())
    assert early["x-request-id"] == "mine-7"
    assert int(early["x-placement-epoch"]) >= 0
    chunks = list(call)
    assert {chunk.request_id for chunk in chunks} == {"mine-7"}
    late = dict(call.trailing_metadata())
    assert late["x-completion-tokens"] == "12"
    assert int(late["x-prompt-tokens"]) > 0
    code, _, _ = failure(
        lambda: stub.Generate(message, timeout=WAIT_S, metadata=(("x-priority", "high"),))
    )
    assert code is INVALID


def test_deadlines_are_the_same_error(stack: Stack, stub: InferenceStub) -> None:
    body = {"prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True}
    headers = {"x-request-timeout-ms": "300"}
    response = stack.http.post("/v1/completions", json=body, headers=headers)
    assert response.status_code in (408, 504)
    error = response.json()["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(request_of(**message_of(body)), timeout=0.3)
    late: Any = caught.value
    assert late.code() is CODES.DEADLINE_EXCEEDED


def test_the_served_model_is_the_same(stack: Stack, stub: InferenceStub) -> None:
    (over_http,) = stack.http.get("/v1/models").json()["data"]
    listed = stub.ListModels(pb.ListModelsRequest(), timeout=WAIT_S).models
    assert [(m.id, m.created, m.max_model_len) for m in listed] == [
        (over_http["id"], over_http["created"], over_http["max_model_len"])
    ]
    assert over_http["id"] == MODEL
    assert listed[0].has_tools
