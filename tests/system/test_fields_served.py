"""Sampling and output fields end to end: a real gateway before real workers, HTTP against gRPC."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import grpc
import openai
import pytest
from google.protobuf import json_format
from google.rpc import error_details_pb2, status_pb2
from pydantic import BaseModel, Field

from benchmarks.harness.serving_cluster import ThreadCluster, make_config, serving
from gateway.text.tokenizer import load_tokenizer
from protos import inference_pb2 as pb
from protos import types_pb2
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.fakes import CLUSTER_TOKEN, attention_entry
from tests.gateway.sse_client import by_choice, read_events
from tests.gateway.stack import MODEL, Stack, post, running_stack
from tests.paths import DEMO

_LOADED = load_tokenizer(str(DEMO))
assert _LOADED is not None
TOKENIZER = _LOADED
SCHEMA = {
    "type": "object",
    "properties": {"b": {"type": "integer", "maximum": 99}, "a": {"enum": ["é", "x"]}},
    "required": ["b", "a"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
SCHEMA_TEXT = json.dumps(SCHEMA, ensure_ascii=False)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
USER = [{"role": "user", "content": "Who is there?"}]


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    """A gateway over the bundled model; answers are the same whenever they are asked for."""
    engine = {"enable_prefix_caching": False, "deterministic": "on"}
    config = make_config(DEMO, dtype="float32", engine=engine)
    cluster = ThreadCluster(dataclasses.replace(config, cluster_token=CLUSTER_TOKEN))
    with serving(cluster), running_stack(tokenizer=TOKENIZER, serving=False) as stack:
        address = cluster.worker("attention-0")["engine_address"]
        entry = {**attention_entry(stack.engine), "engine_address": address}
        stack.call(lambda: stack.controller.change(state="SERVING", workers=[entry]))
        stack.wait_for(lambda: not stack.gateway.readiness.not_ready_reasons(), "readiness")
        yield stack


@pytest.fixture(scope="module")
def stub(stack: Stack) -> Iterator[InferenceStub]:
    with grpc.insecure_channel(stack.grpc_target) as channel:
        yield InferenceStub(channel)


def answer_of(stack: Stack, path: str = COMPLETIONS, **fields: Any) -> dict[str, Any]:
    """An answer that must succeed."""
    start = {"prompt": "ROMEO:"} if path == COMPLETIONS else {"messages": USER}
    response = post(stack, path, **{"max_tokens": 14, "seed": 5, **start, **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def message_of(sampling: dict[str, Any], options: dict[str, Any]) -> pb.GenerateRequest:
    """The same request as ``answer_of`` sends."""
    fields = {
        "text": "ROMEO:",
        "sampling_params": {"max_tokens": 14, "seed": 5, **sampling},
        "output_options": {"return_token_ids": True, **options},
    }
    return json_format.ParseDict(fields, pb.GenerateRequest())


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # name: sampling fields, output fields; gRPC's form of a value is in _GRPC
    "allowed ids": ({"allowed_token_ids": list(range(40, 90))}, {"logprobs": 1}),
    "bad words": ({"bad_words": ["the", "my lord", "\n"]}, {}),
    "named logprobs": ({}, {"logprob_token_ids": [60, 7, 300]}),
    "token names": ({}, {"logprobs": 2, "return_tokens_as_token_ids": True}),
    "prompt logprobs": ({"n": 2}, {"prompt_logprobs": 2}),
    "prompt logprobs and echo": ({}, {"prompt_logprobs": 1, "echo": True, "logprobs": 3}),
    "regex": ({"structured_outputs": {"regex": "[a-z]{2,5}( [0-9])?"}, "n": 2}, {"logprobs": 0}),
    "choice": ({"structured_outputs": {"choice": ["to be", "not to be"]}}, {}),
    "grammar": ({"structured_outputs": {"grammar": 'start: "a" ("b" | "c")~2'}}, {}),
    "json": ({"structured_outputs": {"json": SCHEMA}}, {}),
    "json schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
        {},
    ),
    "json object": ({"response_format": {"type": "json_object"}}, {}),
    "all together": (
        {
            "structured_outputs": {"regex": "[a-z ]{10,20}"},
            "bad_words": ["e"],
            "repetition_penalty": 1.2,
            "frequency_penalty": 0.5,
            "min_tokens": 4,
            "stop": ["sh"],
            "logit_bias": {"80": 3.0},
            "temperature": 1.3,
        },
        {"logprobs": 2, "prompt_logprobs": 0, "return_tokens_as_token_ids": True},
    ),
}
_GRPC: dict[str, dict[str, Any]] = {
    "allowed ids": {"allowed_token_ids": {"ids": list(range(40, 90))}},
    "choice": {"structured_outputs": {"choice": {"texts": ["to be", "not to be"]}}},
    "json": {"structured_outputs": {"json": SCHEMA_TEXT}},
    "json schema": {
        "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA_TEXT}}
    },
}


@pytest.mark.parametrize("name", CASES)
def test_both_codecs_and_their_streams_say_the_same(
    stack: Stack, stub: InferenceStub, name: str
) -> None:
    sampling, options = CASES[name]
    whole = answer_of(stack, **sampling, **options, return_token_ids=True)
    _check_stream(stack, whole, {**sampling, **options})
    message = message_of({**sampling, **_GRPC.get(name, {})}, options)
    answer = stub.Generate(message)
    chunks = list(stub.GenerateStream(message))
    for expected in whole["choices"]:
        choice = answer.choices[expected["index"]]
        parts = [c for c in chunks if c.choice_index == expected["index"]]
        assert choice.text == expected["text"] == "".join(p.text for p in parts)
        assert list(choice.token_ids) == expected["token_ids"]
        assert [t for p in parts for t in p.token_ids] == expected["token_ids"]
        reason = types_pb2.FinishReason.Name(choice.finish_info.reason)
        assert reason == f"FINISH_REASON_{expected['finish_reason'].upper()}"
        assert [e for p in parts for e in p.logprobs] == list(choice.logprobs)
        _check_logprobs(expected["logprobs"], list(choice.logprobs))
        _check_prompt(expected.get("prompt_logprobs"), list(answer.prompt_logprobs))
    assert [e for c in chunks for e in c.prompt_logprobs] == list(answer.prompt_logprobs)


def _check_stream(stack: Stack, whole: dict[str, Any], fields: dict[str, Any]) -> None:
    start = {"prompt": "ROMEO:", "max_tokens": 14, "seed": 5, "return_token_ids": True}
    choices = by_choice(read_events(stack, COMPLETIONS, **start, **fields))
    for expected in whole["choices"]:
        parts = choices[expected["index"]]
        assert "".join(p["text"] for p in parts) == expected["text"]
        assert [t for p in parts for t in p["token_ids"]] == expected["token_ids"]
        assert parts[0].get("prompt_logprobs") == expected.get("prompt_logprobs")
        assert not any("prompt_logprobs" in p for p in parts[1:])
        for key, values in (expected["logprobs"] or {}).items():
            assert [v for p in parts for v in p["logprobs"][key]] == values


def _check_logprobs(expected: dict[str, Any] | None, entries: list[types_pb2.TokenLogprob]) -> None:
    if expected is None:
        assert not entries
        return
    assert len({len(values) for values in expected.values()}) == 1
    assert [e.token for e in entries] == expected["tokens"]
    assert [e.text_offset for e in entries] == expected["text_offset"]
    values = [e.logprob if e.HasField("logprob") else None for e in entries]
    assert values == expected["token_logprobs"]
    tops = [{t.token: t.logprob for t in e.top_logprobs} or None for e in entries]
    assert tops == expected["top_logprobs"]


def _check_prompt(
    expected: list[dict[str, Any] | None] | None, entries: list[types_pb2.TokenLogprob]
) -> None:
    if expected is None:
        assert not entries
        return
    assert expected[0] is None
    assert not entries[0].HasField("logprob")
    for wanted, entry in zip(expected[1:], entries[1:], strict=True):
        assert wanted is not None
        own = wanted[str(entry.token_id)]
        assert (own["logprob"], own["rank"]) == (entry.logprob, entry.rank)
        others = {str(t.token_id): t.logprob for t in entry.top_logprobs}
        assert {key: value["logprob"] for key, value in wanted.items()} == others


def test_what_the_fields_do(stack: Stack) -> None:
    def texts(name: str, **more: Any) -> list[str]:
        sampling, options = CASES[name]
        answer = answer_of(stack, **sampling, **options, **more)
        return [choice["text"] for choice in answer["choices"]]

    assert all(re.fullmatch("[a-z]{2,5}( [0-9])?", t) for t in texts("regex"))
    assert texts("choice")[0] in ("to be", "not to be")
    assert re.fullmatch("a[bc]{2}", texts("grammar")[0])
    for name in ("json", "json schema"):
        assert list(json.loads(texts(name, max_tokens=60)[0])) == ["b", "a"]
    assert texts("json object")[0].startswith("{")
    assert "\n" not in texts("bad words", max_tokens=60)[0]
    assert re.fullmatch("[a-z ]{0,20}", texts("all together")[0])


@pytest.mark.parametrize("word", ["my lord", "the", "\n"])
def test_bad_words_are_not_said_by_their_tokens(stack: Stack, word: str) -> None:
    forms = [TOKENIZER.encode(form, False) for form in (word, f" {word}")]
    fields: dict[str, Any] = {
        "bad_words": [word],
        "max_tokens": 120,
        "return_token_ids": True,
        "ignore_eos": True,
        "temperature": 0,
    }
    for prompt in ("O ", "ROMEO:\nWhat, "):
        (choice,) = answer_of(stack, prompt=prompt, **fields)["choices"]
        ids = tuple(choice["token_ids"])
        assert len(ids) == 120
        for form in forms[: 1 if word == "\n" else 2]:
            windows = {ids[i : i + len(form)] for i in range(len(ids))}
            assert form not in windows


@pytest.mark.parametrize("name", [n for n, (_, options) in CASES.items() if "echo" not in options])
def test_chat_streams_the_same(stack: Stack, name: str) -> None:
    sampling, options = CASES[name]
    fields = {**sampling, **options, "return_token_ids": True}
    if "logprobs" in fields:
        fields["top_logprobs"], fields["logprobs"] = fields["logprobs"], True
    whole = answer_of(stack, CHAT, **fields)
    events = read_events(stack, CHAT, messages=USER, max_tokens=14, seed=5, **fields)
    for index, parts in by_choice(events).items():
        expected = whole["choices"][index]
        text = "".join(p["delta"].get("content", "") for p in parts)
        assert text == expected["message"]["content"]
        assert parts[-1]["finish_reason"] == expected["finish_reason"]
        if expected["logprobs"] is not None:
            entries = [e for p in parts[1:] for e in p["logprobs"]["content"]]
            assert entries == expected["logprobs"]["content"]
    found = [event["prompt_logprobs"] for event in events if "prompt_logprobs" in event]
    assert all(entries == whole["prompt_logprobs"] for entries in found)
    assert bool(found) is ("prompt_logprobs" in whole)


class Trade(BaseModel):
    """Kept short, so that a small model comes to an end."""

    name: Literal["smith", "king"]
    level: Annotated[int, Field(ge=0, le=99)] | None


class Person(BaseModel):
    """A schema with references, as openai-python makes it of types."""

    trade: Trade
    moods: Annotated[list[Literal["merry", "sad"]], Field(max_length=2)]


def test_openai_s_parse_gets_its_type(stack: Stack) -> None:
    with openai.OpenAI(base_url=f"{stack.url}/v1", api_key="x", max_retries=0) as client:
        answer = client.chat.completions.parse(
            model=MODEL,
            messages=[{"role": "user", "content": "Who is there?"}],
            response_format=Person,
            temperature=0,
            max_tokens=500,
        )
    person = answer.choices[0].message.parsed
    assert isinstance(person, Person)
    assert answer.choices[0].finish_reason == "stop"


def test_named_tokens_replace_the_most_probable(stack: Stack) -> None:
    ids = [60, 7, 300]
    names = [TOKENIZER.token_text(i) for i in ids]
    (choice,) = answer_of(stack, logprob_token_ids=ids, max_tokens=3)["choices"]
    for token, top in zip(
        choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"], strict=True
    ):
        assert list(top) == list(dict.fromkeys([*names, token]))
    (chat,) = answer_of(stack, CHAT, logprob_token_ids=ids, max_tokens=2)["choices"]
    for entry in chat["logprobs"]["content"]:
        assert [t["token"] for t in entry["top_logprobs"]] == names


FIELD_ERRORS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    # HTTP fields, gRPC sampling fields (or None: the same), the field at fault
    ({"structured_outputs": {"regex": "(x"}}, {}, "structured_outputs.regex"),
    ({"structured_outputs": {"grammar": "start: nobody"}}, {}, "structured_outputs.grammar"),
    ({"structured_outputs": {"regex": "(" * 9000 + ")" * 9000}}, {}, "structured_outputs.regex"),
    (
        {"structured_outputs": {"json": {"enum": []}}},
        {"structured_outputs": {"json": '{"enum": []}'}},
        "structured_outputs.json",
    ),
    ({"bad_words": ["x", ""]}, {}, "bad_words"),
    ({"bad_words": ["x" * 257]}, {}, "bad_words"),
    ({"bad_words": ["x"] * 1025}, {}, "bad_words"),
    ({"allowed_token_ids": []}, {"allowed_token_ids": {}}, "allowed_token_ids"),
    ({"allowed_token_ids": [1024]}, {"allowed_token_ids": {"ids": [1024]}}, "allowed_token_ids"),
    (
        {"allowed_token_ids": [1], "min_tokens": 2},
        {"allowed_token_ids": {"ids": [1]}, "min_tokens": 2},
        "allowed_token_ids",
    ),
]


@pytest.mark.parametrize(("fields", "sampling", "param"), FIELD_ERRORS)
def test_errors_are_the_same_in_both_codecs(
    stack: Stack,
    stub: InferenceStub,
    fields: dict[str, Any],
    sampling: dict[str, Any],
    param: str,
) -> None:
    for stream in (False, True):
        response = post(stack, COMPLETIONS, prompt="x", stream=stream, **fields)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "invalid_value")
        assert error["type"] == "invalid_request_error"
        assert error["param"] == param
    with pytest.raises(grpc.RpcError) as caught:
        stub.Generate(message_of(sampling or fields, {}))
    refused: Any = caught.value
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert refused.details() == error["message"]
    status = status_pb2.Status.FromString(
        dict(refused.trailing_metadata())["grpc-status-details-bin"]
    )
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    assert bad.field_violations[0].field == param


def test_a_stream_ends_with_an_error_where_no_token_is_left(stack: Stack) -> None:
    """The q fits once; then neither it nor the end may come."""
    (q,) = TOKENIZER.encode("q")
    fields = {"structured_outputs": {"regex": "qz+"}, "allowed_token_ids": [q], "prompt": "x"}
    response = post(stack, COMPLETIONS, **fields)
    assert response.status_code == 400
    assert "no token is allowed at position 1" in response.json()["error"]["message"]
    events = read_events(stack, COMPLETIONS, **fields)
    assert events[0]["choices"][0]["text"] == "q"
    assert "no token is allowed at position 1" in events[-1]["error"]["message"]
