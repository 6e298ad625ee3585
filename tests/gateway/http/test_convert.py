"""Bodies and messages become the same call; neutral values and unbuilt fields."""

from __future__ import annotations

import dataclasses
import gc
import json
from typing import Any

import pytest
from google.protobuf import json_format
from pydantic import ValidationError

from cluster.config.gateway import GatewaySection
from cluster.core.errors import RequestError, UnsupportedParameterError
from gateway.core.bodies import StrictBody
from gateway.core.call import CallKind, GenerateCall
from gateway.core.field_checks import MAX_MESSAGES, MAX_PARTS, check_fields
from gateway.grpc.convert import grpc_call
from gateway.http.convert import chat_call, completion_call
from gateway.http.parse import parse_body, parse_json
from gateway.http.pooling import EmbeddingsBody, InspectBody
from gateway.http.schema import ChatBody, CompletionBody, DetokenizeBody
from gateway.http.unsupported import check_unsupported
from gateway.offload.long_work import GcPause
from gateway.responses.unsupported import check_unsupported as check_unbuilt_response
from gateway.text.tool_formats.tools import MAX_TOOLS
from protos import inference_pb2 as pb

SAMPLING: dict[str, Any] = {
    "max_tokens": 7,
    "min_tokens": 2,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 4,
    "min_p": 0.1,
    "frequency_penalty": -0.5,
    "presence_penalty": 0.25,
    "repetition_penalty": 1.5,
    "logit_bias": {"3": -1.0, "1": 2.0},
    "seed": -5,
    "n": 3,
    "use_beam_search": True,
    "length_penalty": 0.5,
    "stop": ["a", "bc"],
    "stop_token_ids": [5, 6],
    "ignore_eos": True,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
}
UNBUILT: dict[str, Any] = {
    "guided_json": {},
    "guided_regex": "a",
    "guided_choice": ["a"],
    "guided_grammar": "a",
    "guided_json_object": True,
    "guided_whitespace_pattern": " ",
    "guided_decoding_backend": "guidance",
    "structural_tag": "{}",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "functions": [{"name": "f"}],
    "function_call": "auto",
    "spaces_between_special_tokens": False,
    "logits_processors": ["x"],
    "suffix": "end",
    "prompt_embeds": "AA==",
    "audio": {"voice": "x"},
    "modalities": ["text", "audio"],
    "prediction": {"type": "content"},
    "web_search_options": {},
    "chat_template": "{{ x }}",
    "documents": [{"text": "x"}],
    "mm_processor_kwargs": {"a": 1},
    "kv_transfer_params": {"a": 1},
}
NEUTRAL: dict[str, Any] = {
    "best_of": 1,
    "return_tokens_as_token_ids": False,
    "bad_words": [],
    "logprob_token_ids": [],
    "response_format": {"type": "text"},
    "structured_outputs": {},
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "functions": [],
    "function_call": "none",
    "use_beam_search": False,
    "length_penalty": 1.0,
    "early_stopping": False,
    "spaces_between_special_tokens": True,
    "suffix": "",
    "modalities": ["text"],
    "echo": False,
    "user": "somebody",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "reasoning_effort": "low",
    "a field that nobody knows": [1],
}


OPTIONS: dict[str, Any] = {
    "logprobs": 2,
    "prompt_logprobs": 3,
    "logprob_token_ids": [4, 5],
    "echo": True,
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
}
KEEPING = {"cache_salt": "s", "cache_ttl": 0, "session_id": "a", "prompt_cache_key": "b"}
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}}}
SCHEMA_TEXT = '{"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}}}'


def test_a_body_and_a_message_give_the_same_call() -> None:
    words = {"bad_words": ["x", "y z"]}
    data = {**SAMPLING, **OPTIONS, **words, "allowed_token_ids": [7, 1], **KEEPING}
    sampling = {**SAMPLING, **words, "allowed_token_ids": {"ids": [7, 1]}}
    message = pb.GenerateRequest()
    json_format.ParseDict(
        {
            "token_ids": {"ids": [1, 2]},
            "sampling_params": sampling,
            "output_options": OPTIONS,
            **KEEPING,
        },
        message,
    )
    fields = completion_call(parse_body(CompletionBody, {**data, "prompt": [1, 2]}))
    assert grpc_call(message) == fields
    for name in (*OPTIONS, *sampling, *KEEPING):
        assert getattr(fields, name) is not getattr(GenerateCall(kind=fields.kind), name), name


@pytest.mark.parametrize(
    ("http", "grpc"),
    [
        ({"structured_outputs": {"regex": "a+"}}, None),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, None),
        ({"structured_outputs": {"json_object": True}}, None),
        ({"structured_outputs": {"json": SCHEMA_TEXT}}, None),
        (
            {"structured_outputs": {"json": SCHEMA}},
            {"structured_outputs": {"json": SCHEMA_TEXT}},
        ),
        (
            {"structured_outputs": {"choice": ["a", "b"]}},
            {"structured_outputs": {"choice": {"texts": ["a", "b"]}}},
        ),
        ({"response_format": {"type": "json_object"}}, None),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
            {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA_TEXT}}},
        ),
    ],
)
def test_structured_output_is_the_same_in_both_codecs(
    http: dict[str, Any], grpc: dict[str, Any] | None
) -> None:
    fields = completion_call(parse_body(CompletionBody, {"prompt": "a", **http}))
    message = json_format.ParseDict(
        {"text": "a", "sampling_params": grpc or http}, pb.GenerateRequest()
    )
    assert fields.grammar is not None
    assert grpc_call(message) == fields


@pytest.mark.parametrize(
    ("data", "param"),
    [
        ({"logprobs": False, "logprob_token_ids": [3]}, None),
        ({"logprobs": True, "logprob_token_ids": [3]}, None),
        ({"logprobs": True, "top_logprobs": 1, "logprob_token_ids": [3]}, 1),
        ({"logprobs": True}, 0),
    ],
)
def test_chat_logprobs_with_named_tokens(data: dict[str, Any], param: int | None) -> None:
    body = parse_body(ChatBody, {"messages": [], **data})
    assert chat_call(body).logprobs == param


def test_a_chat_body_and_a_message_give_the_same_call() -> None:
    messages = [{"role": "user", "content": "hi", "name": "bob"}]
    options = {
        "add_generation_prompt": False,
        "chat_template": "{{ a }}",
        "chat_template_kwargs": {"a": "b"},
    }
    body = parse_body(ChatBody, {**SAMPLING, "messages": messages, **options})
    message = pb.GenerateRequest()
    chat = {"messages": messages, **options}
    json_format.ParseDict({"messages": chat, "sampling_params": SAMPLING}, message)
    expected = dataclasses.replace(chat_call(body), logprobs_name="logprobs")
    assert grpc_call(message) == expected


def test_unset_is_none_in_both_codecs() -> None:
    http = completion_call(parse_body(CompletionBody, {"prompt": "a"}))
    grpc = grpc_call(pb.GenerateRequest(text="a"))
    assert http == grpc == GenerateCall(kind=CallKind.COMPLETION, prompts=("a",))


def test_null_is_unset() -> None:
    names = [*CompletionBody.model_fields, *UNBUILT]
    data = {**dict.fromkeys(names), "prompt": "a"}
    check_unsupported(data, "completion")
    assert completion_call(parse_body(CompletionBody, data)).prompts == ("a",)


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1, 2], [3]], ((1, 2), (3,))),
        ([], ()),
        ([[]], ((),)),
    ],
)
def test_prompts_of_all_forms(prompt: Any, prompts: Any) -> None:
    assert completion_call(parse_body(CompletionBody, {"prompt": prompt})).prompts == prompts


@pytest.mark.parametrize(("given", "text"), [(False, "false"), (True, "true"), ("never", "never")])
def test_early_stopping_is_a_truth_value_or_never(given: bool | str, text: str) -> None:
    body = parse_body(CompletionBody, {"prompt": "x", "early_stopping": given})
    message = pb.GenerateRequest(text="x")
    message.sampling_params.early_stopping = text
    assert completion_call(body).early_stopping == grpc_call(message).early_stopping == text
    wrongs: tuple[object, ...] = ("true", 1, [], {})
    for wrong in wrongs:
        with pytest.raises(RequestError, match=r"^early_stopping must be false, true or") as found:
            parse_body(CompletionBody, {"prompt": "x", "early_stopping": wrong})
        assert found.value.param == "early_stopping"


def test_other_calls_have_no_beams() -> None:
    for name, value in (("use_beam_search", True), ("length_penalty", 2.0)):
        with pytest.raises(UnsupportedParameterError, match=name):
            check_unsupported({name: value}, "tokenize")
        with pytest.raises(UnsupportedParameterError, match=name):
            check_unbuilt_response({name: value})


def test_max_completion_tokens_wins() -> None:
    data = {"messages": [], "max_tokens": 1, "max_completion_tokens": 2}
    fields = chat_call(parse_body(ChatBody, data))
    assert (fields.max_tokens, fields.max_tokens_name) == (2, "max_completion_tokens")


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    data = {"messages": [{"role": "user", "content": parts}]}
    chat = chat_call(parse_body(ChatBody, data)).chat
    assert chat is not None
    assert chat.messages[0]["content"] == "a\nb"


def test_an_assistant_may_have_no_content() -> None:
    data = {"messages": [{"role": "assistant", "content": None, "tool_calls": None, "x": 1}]}
    chat = chat_call(parse_body(ChatBody, data)).chat
    assert chat is not None
    assert chat.messages == ({"role": "assistant", "content": "", "x": 1},)


@pytest.mark.parametrize("name", UNBUILT)
def test_fields_that_are_not_built_are_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedParameterError) as caught:
        check_unsupported({name: UNBUILT[name]}, "completion")
    assert caught.value.param == name
    assert name in caught.value.message


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_values_are_never_an_error(name: str) -> None:
    check_unsupported({name: NEUTRAL[name]}, "chat")


def test_tools_that_may_not_be_called_are_neutral() -> None:
    check_unsupported({"tools": UNBUILT["tools"], "tool_choice": "none"}, "chat")


@pytest.mark.parametrize(("strict", "expected"), [(None, False), (False, False), (True, True)])
def test_tools_are_strict_where_they_say_so(strict: bool | None, expected: bool) -> None:
    function = {"name": "f", "parameters": {"type": "object"}, "strict": strict}
    tools = [{"type": "function", "function": function}]
    use = chat_call(parse_body(ChatBody, {"messages": [SAID], "tools": tools})).tools
    assert use is not None
    assert [tool.is_strict for tool in use.tools] == [expected]


def test_completions_have_no_tools() -> None:
    with pytest.raises(UnsupportedParameterError, match="tool_choice"):
        check_unsupported({"tool_choice": "required"}, "completion")
    for name, value in (("truncate_prompt_tokens", 5), ("truncation_side", "left")):
        with pytest.raises(UnsupportedParameterError, match=name):
            check_unsupported({name: value}, "tokenize")


def test_best_of_is_refused_for_chat_unless_it_is_n() -> None:
    check_unsupported({"best_of": 3, "n": 3}, "chat")
    with pytest.raises(UnsupportedParameterError, match="best_of"):
        check_unsupported({"best_of": 4, "n": 3}, "chat")


def test_echo_is_refused_for_chat_only() -> None:
    check_unsupported({"echo": True}, "completion")
    with pytest.raises(UnsupportedParameterError, match="echo"):
        check_unsupported({"echo": True}, "chat")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content"),
        ({"role": "assistant", "function_call": {"name": "f"}}, "messages[0].function_call"),
    ],
)
def test_messages_that_are_not_built_are_refused(message: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedParameterError) as caught:
        chat_call(parse_body(ChatBody, {"messages": [message]}))
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"embeddings": {}, "output_options": {"return_token_ids": True}}, "return_token_ids"),
        ({"embeddings": {}, "output_options": {"prompt_logprobs": 0}}, "prompt_logprobs"),
        ({"embeddings": {}, "sampling_params": {"repetition_penalty": 1.1}}, "repetition_penalty"),
        (
            {"text": "a", "sampling_params": {"response_format": {"type": "structural_tag"}}},
            "response_format",
        ),
        ({"messages": {}, "output_options": {"echo": True}}, "echo"),
    ],
)
def test_message_fields_that_are_not_built(data: dict[str, Any], name: str) -> None:
    message = json_format.ParseDict(data, pb.GenerateRequest())
    with pytest.raises(UnsupportedParameterError) as caught:
        check_fields(grpc_call(message), GatewaySection())
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (b"\xff\xfe", "JSON"),
        (b'{"a": "\\ud800"}', "JSON"),
        (b"1" * 5000, "JSON"),
        (b"[1]", "object"),
        (b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}", "deep"),
        (b"[" * 100_000, "deep"),
        (b'{"a": 1,\n"b" 2}', "line 2, column 5"),
    ],
)
def test_what_is_no_json_object(raw: bytes, reason: str) -> None:
    with pytest.raises(RequestError, match=reason) as caught:
        parse_json(raw, 64)
    assert caught.value.code == "json_invalid"


def test_depth_within_the_limit_is_fine() -> None:
    data = parse_json(b'{"a": ' + b"[" * 63 + b"]" * 63 + b"}", 64)
    assert list(data) == ["a"]
    assert parse_json(b'{"a": "\\ud83d\\ude00"}', 1) == {"a": "\U0001f600"}


MANY = 20_000
SAID = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (CompletionBody, {"prompt": ["a"] * MANY + [1]}),
        (CompletionBody, {"prompt": [["a"]] * MANY}),
        (CompletionBody, {"prompt": [["a"] * MANY]}),
        (CompletionBody, {"prompt": "a", "stop": [1] * MANY}),
        (CompletionBody, {"prompt": "a", "stop_token_ids": ["a"] * MANY}),
        (CompletionBody, {"prompt": "a", "allowed_token_ids": [None] * MANY}),
        (ChatBody, {"messages": [{}] * MAX_MESSAGES}),
        (ChatBody, {"messages": [{**SAID, "content": [{}] * MANY}]}),
        (ChatBody, {"messages": [{**SAID, "tool_calls": [{}] * MANY}]}),
        (ChatBody, {"messages": [SAID], "structured_outputs": {"choice": [1] * MANY}}),
        (DetokenizeBody, {"tokens": ["a"] * MANY}),
        (EmbeddingsBody, {"input": [[1, "a"]] * MANY}),
        (InspectBody, {"token_ids": ["a"] * MANY, "outputs": [1] * MANY}),
    ],
)
def test_wrong_items_are_not_all_described(kind: type[StrictBody], fields: dict[str, Any]) -> None:
    """One for each type that a field may have, though a body has room for millions."""
    with pytest.raises(RequestError) as caught:
        parse_body(kind, fields)
    cause = caught.value.__cause__
    assert isinstance(cause, ValidationError)
    assert cause.error_count() <= 5


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"messages": [SAID] * (MAX_MESSAGES + 1)}, "messages", "16385 entries, at most 16384"),
        ({"messages": [{"a": 1}] * MANY}, "messages", "20000 entries, at most 16384"),
        (
            {"messages": [{**SAID, "content": [{"type": "text", "text": "a"}] * MAX_PARTS}]},
            "messages",
            "65538 fields, parts and calls, at most 65536",
        ),
        ({"messages": [{**SAID, "tool_calls": [{}] * MAX_PARTS}]}, "messages", "65539 fields"),
        (
            {"messages": [SAID], "tools": [{}] * (MAX_TOOLS + 1)},
            "tools",
            "129 entries, at most 128",
        ),
        (
            {"messages": [SAID], "logit_bias": {str(i): "x" for i in range(1025)}},
            "logit_bias",
            "1025 entries, at most 1024",
        ),
    ],
)
def test_entries_are_counted_before_they_are_read(
    fields: dict[str, Any], param: str, words: str
) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        parse_body(ChatBody, fields)
    assert caught.value.param == param
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("chat", "param", "words"),
    [
        ({"messages": [{}] * (MAX_MESSAGES + 1)}, "messages", "16385 entries, at most 16384"),
        ({"messages": [{"tool_calls": [{}] * (MAX_PARTS + 1)}]}, "messages", "65537 fields"),
        ({"messages": [{}], "tools": [{}] * (MAX_TOOLS + 1)}, "tools", "129 entries, at most 128"),
    ],
)
def test_entries_of_messages_are_counted_first(
    chat: dict[str, Any], param: str, words: str
) -> None:
    message = json_format.ParseDict({"messages": chat}, pb.GenerateRequest())
    with pytest.raises(RequestError, match=words) as caught:
        grpc_call(message)
    assert caught.value.param == param


def test_a_body_is_parsed_without_collections() -> None:
    """Each would go through all that is there: two thirds of the time of a large body."""
    seen: list[str] = []

    def note(phase: str, info: dict[str, int]) -> None:
        seen.append(phase)

    raw = b'{"x":[' + b",".join([b"[]"] * 100_000) + b"]}"
    gc.callbacks.append(note)
    try:
        json.loads(raw)
        usual = len(seen)
        parse_json(raw, 64)
        assert len(seen) - usual < usual / 10
    finally:
        gc.callbacks.remove(note)
    assert gc.isenabled()


def test_collections_come_back_after_the_last_of_several_parses() -> None:
    """Whichever of two that overlap ends first."""
    paused = GcPause()
    with paused:
        with paused:
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_refusals_of_earlier_answers_are_text() -> None:
    parts = [{"type": "text", "text": "No."}, {"type": "refusal", "refusal": "I cannot."}]
    refusal = "No.\nI cannot."
    messages: list[dict[str, Any]] = [
        {"content": parts},
        {"content": None, "refusal": refusal},
        {"content": "", "refusal": refusal},
        {"content": [], "refusal": refusal},
    ]
    for message in messages:
        body = ChatBody.model_validate(
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", **message}]}
        )
        chat = chat_call(body).chat
        assert chat is not None
        assert chat.messages[1]["content"] == "No.\nI cannot."
    user = {"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}
    with pytest.raises(UnsupportedParameterError, match="'refusal' are not supported"):
        chat_call(ChatBody.model_validate({"messages": [user]}))
