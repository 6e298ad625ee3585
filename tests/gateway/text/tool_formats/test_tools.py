"""Tool calling: what may be offered, how calls are written, and what clients of both codecs see."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import openai
import pytest

from cluster.core.errors import RequestError
from gateway.core.tool_use import Tool, ToolCallFormat, ToolUse
from gateway.text.chat_template import ChatTemplate
from gateway.text.tool_formats.answer_grammar import answer_grammar
from gateway.text.tool_formats.answer_parser import AnswerParser
from gateway.text.tool_formats.tool_calls import ParsedPiece
from gateway.text.tool_formats.tools import make_tool_use
from protos import inference_pb2 as pb
from protos import types_pb2
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.fakes import CHAT_TEMPLATE, EOS_ID, saying, tiny_backend, tiny_tokenizer
from tests.gateway.grpc.test_grpc import failure, request_of
from tests.gateway.sse_client import by_choice, parse_events
from tests.gateway.stack import MODEL, WAIT_S, Stack, post, running_stack
from workers.requests.request import Grammar, GrammarKind
from workers.sampling.grammar_compiler import GrammarCompiler

pytestmark = pytest.mark.heavy

TEMPLATE = (
    "{% if tools %}{% for tool in tools %}tool {{ tool.function.name }}\n{% endfor %}{% endif %}"
    "{% for message in messages %}"
    "<|{{ 'user' if message.role == 'tool' else message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""As Qwen's templates do it, in short."""
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "now", "description": "Tells the time."}},
]
OFFERED = (Tool(name="weather", parameters=SCHEMA), Tool(name="now"))
ARGUMENTS = '{"city": "Bad \\"Ems\\" }]", "days": 3}'
FIRST = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
SECOND = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
BOTH = f"On it.\n{FIRST}\n{SECOND}"
LISTED = f'[TOOL_CALLS][{{"name": "weather", "arguments": {ARGUMENTS}}}]'
CUT = FIRST[: FIRST.index(ARGUMENTS) + 20]
"""Ends within the arguments."""
USER = [{"role": "user", "content": "hi"}]
BROKEN_CALL = {"function": {"name": "a", "arguments": "["}}
CHAT = "/v1/chat/completions"


# ---- reading calls --------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("form", "text", "content", "calls", "is_complete"),
    [
        (ToolCallFormat.HERMES, BOTH, "On it.\n", [("weather", ARGUMENTS), ("now", "{}")], True),
        (ToolCallFormat.HERMES, CUT, "", [("weather", ARGUMENTS[:20])], False),
        (ToolCallFormat.HERMES, "a <tool_cal", "a <tool_cal", [], False),
        (ToolCallFormat.HERMES, "", "", [], False),
        (ToolCallFormat.MISTRAL, LISTED, "", [("weather", ARGUMENTS)], True),
    ],
)
def test_calls_are_found_however_the_text_is_cut(
    form: ToolCallFormat,
    text: str,
    content: str,
    calls: list[tuple[str, str]],
    is_complete: bool,
    size: int,
) -> None:
    parser = AnswerParser(form, ToolUse(tools=OFFERED))
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    parsed = [parser.feed(piece) for piece in pieces]
    parsed.append(parser.feed("", is_last=True))
    assert "".join(one.content for one in parsed) == content
    deltas = [delta for one in parsed for delta in one.calls]
    opened = [(delta.index, delta.name) for delta in deltas if delta.name]
    assert opened == [(place, name) for place, (name, _) in enumerate(calls)]
    assert all((delta.call_id is None) is (delta.name is None) for delta in deltas)
    for place, (_, arguments) in enumerate(calls):
        assert "".join(d.arguments for d in deltas if d.index == place) == arguments
    assert parser.has_calls is is_complete
    parser = AnswerParser(form, ToolUse(tools=OFFERED))
    whole = parser.feed(text, is_last=True).merge_calls()
    assert (whole.content, parser.has_calls) == (content, is_complete)
    assert [(call.name, call.arguments) for call in whole.calls] == calls
    assert len({call.call_id for call in whole.calls}) == len(whole.calls)


def test_a_cut_mark_is_no_text_where_the_answer_must_be_a_call() -> None:
    use = ToolUse(tools=OFFERED, must_call=True)
    whole = AnswerParser(ToolCallFormat.HERMES, use)
    assert whole.feed("<tool_cal", is_last=True) == ParsedPiece("")
    assert not whole.has_calls
    parser = AnswerParser(ToolCallFormat.HERMES, use)
    parsed = [parser.feed("<to"), parser.feed("ol"), parser.feed("", is_last=True)]
    assert [one.content for one in parsed] == ["", "", ""]


# ---- the grammar ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> GrammarCompiler:
    """For the vocabulary of the tests."""
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    backend = tiny_backend()
    backend.save(str(folder / "tokenizer.json"))
    return GrammarCompiler(folder, backend.get_vocab_size(), [EOS_ID])


def accepts(compiler: GrammarCompiler, grammar: Grammar | None, text: str) -> bool:
    """Whether an answer may be ``text``, as a whole."""
    assert grammar is not None
    state = compiler.compile(grammar).start()
    ids = tiny_tokenizer().encode(text, False)
    for token in [*ids, EOS_ID]:
        if not bool(state.mask().allowed[token]):
            return False
        state.advance(token)
    return True


WRONG = FIRST.replace('"city"', '"town"')
UNKNOWN = SECOND.replace("now", "never")


@pytest.mark.parametrize(
    ("use", "good", "bad"),
    [
        (
            ToolUse(tools=OFFERED),
            ["no call", BOTH, f"{FIRST}", f"x < y <tool {SECOND}\n{FIRST}"],
            [WRONG, UNKNOWN, f"x {WRONG}", FIRST[:-3], f"{FIRST} and more"],
        ),
        (ToolUse(tools=OFFERED, is_parallel=False), ["no call", FIRST], [f"{FIRST}\n{SECOND}"]),
        (
            ToolUse(tools=OFFERED, must_call=True),
            [FIRST, SECOND, f"{FIRST}\n{SECOND}"],
            ["no call", BOTH, "", WRONG],
        ),
        (ToolUse(tools=OFFERED, must_call=True, only=("now",)), [SECOND], [FIRST, "x"]),
    ],
)
def test_answers_follow_the_tools(
    compiler: GrammarCompiler, use: ToolUse, good: list[str], bad: list[str]
) -> None:
    grammar = answer_grammar(use, ToolCallFormat.HERMES, {}, None)
    assert grammar is not None
    assert grammar.field == "tools"
    assert [text for text in good if not accepts(compiler, grammar, text)] == []
    assert [text for text in bad if accepts(compiler, grammar, text)] == []


def test_arguments_that_a_schema_does_not_name(compiler: GrammarCompiler) -> None:
    """JSON schema allows them by default; functions do not have them."""
    text = '<tool_call>\n{"name": "f", "arguments": {"city": 1, "more": 2}}\n</tool_call>'
    schema: dict[str, Any] = {"properties": {"city": {"type": "integer"}}}
    for parameters, is_open in (
        (schema, False),
        ({**schema, "additionalProperties": True}, True),
        ({}, True),
        (None, False),
    ):
        use = ToolUse(tools=(Tool(name="f", parameters=parameters),), must_call=True)
        grammar = answer_grammar(use, ToolCallFormat.HERMES, {}, None)
        assert accepts(compiler, grammar, text) is is_open


def test_other_forms(compiler: GrammarCompiler) -> None:
    grammar = answer_grammar(ToolUse(tools=OFFERED), ToolCallFormat.MISTRAL, {}, None)
    listed = LISTED.replace("[TOOL_CALLS][", "[TOOL_CALLS] [")
    for text in (LISTED, listed, "no call"):
        assert accepts(compiler, grammar, text)
    assert not accepts(compiler, grammar, LISTED[:-1])
    marks = {"<tool_call>": tiny_backend().get_vocab()["<|user|>"]}
    special = answer_grammar(
        ToolUse(tools=OFFERED, must_call=True), ToolCallFormat.HERMES, marks, None
    )
    assert accepts(compiler, special, FIRST.replace("<tool_call>", "<|user|>"))
    assert not accepts(compiler, special, FIRST)


def test_calls_beside_a_response_format(compiler: GrammarCompiler) -> None:
    answer = Grammar(
        kind=GrammarKind.JSON_SCHEMA, text='{"type":"integer"}', field="response_format"
    )
    grammar = answer_grammar(ToolUse(tools=OFFERED), ToolCallFormat.HERMES, {}, answer)
    assert accepts(compiler, grammar, "17")
    assert accepts(compiler, grammar, FIRST)
    assert not accepts(compiler, grammar, "seventeen")
    words = Grammar(kind=GrammarKind.REGEX, text="a", field="structured_outputs.regex")
    with pytest.raises(RequestError, match=r"structured_outputs\.regex cannot be used with tools"):
        answer_grammar(ToolUse(tools=OFFERED), ToolCallFormat.HERMES, {}, words)


def test_forms_are_read_from_templates() -> None:
    assert ChatTemplate(TEMPLATE).tool_format is ToolCallFormat.HERMES
    assert ChatTemplate("{{ tools }}[TOOL_CALLS]").tool_format is ToolCallFormat.MISTRAL
    assert ChatTemplate(CHAT_TEMPLATE).tool_format is None
    assert not ChatTemplate("{% set tools = 1 %}{{ tools }}<tool_call>").has_tools
    other = ChatTemplate("{{ tools }}")
    assert (other.has_tools, other.tool_format) == (True, None)


@pytest.mark.parametrize(
    ("tools", "choice", "name", "param"),
    [
        ([Tool(name="a b")], None, None, "tools[0].function.name"),
        ([Tool(name="a"), Tool(name="a")], None, None, "tools[1].function.name"),
        (
            [Tool(name="a", parameters={"type": "string"})],
            None,
            None,
            "tools[0].function.parameters",
        ),
        (
            [Tool(name="a", parameters={"properties": {"b": {"enum": [float("nan")]}}})],
            None,
            None,
            "tools[0].function.parameters",
        ),
        ([Tool(name=f"f{i}") for i in range(129)], None, None, "tools"),
        ([], "required", None, "tool_choice"),
        ([], None, "a", "tool_choice"),
        ([Tool(name="a")], "always", None, "tool_choice"),
        ([Tool(name="a")], None, "b", "tool_choice"),
    ],
)
def test_wrong_tools_are_refused(
    tools: list[Tool], choice: str | None, name: str | None, param: str
) -> None:
    with pytest.raises(RequestError) as caught:
        make_tool_use(tools, choice, name, None)
    assert caught.value.param == param


# ---- both codecs ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tool_stack() -> Iterator[Stack]:
    """A gateway whose model has tools."""
    with running_stack(tokenizer=tiny_tokenizer(TEMPLATE)) as stack:
        yield stack


@pytest.fixture(scope="module")
def stub(tool_stack: Stack) -> Iterator[InferenceStub]:
    """Its gRPC client."""
    with grpc.insecure_channel(tool_stack.grpc_target) as channel:
        yield InferenceStub(channel)


@pytest.fixture(scope="module")
def client(tool_stack: Stack) -> Iterator[openai.OpenAI]:
    """openai-python on it."""
    url = f"{tool_stack.url}/v1"
    with openai.OpenAI(base_url=url, api_key="x", max_retries=0, timeout=WAIT_S) as client:
        yield client


def test_openai_gets_calls_whole_and_streamed(tool_stack: Stack, client: openai.OpenAI) -> None:
    tool_stack.engine.script = saying(BOTH)
    asked: dict[str, Any] = {"model": MODEL, "messages": USER, "tools": TOOLS}
    (choice,) = client.chat.completions.create(**asked).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "On it.\n"
    calls: Any = choice.message.tool_calls
    assert [(call.type, call.function.name) for call in calls] == [
        ("function", "weather"),
        ("function", "now"),
    ]
    assert json.loads(calls[0].function.arguments) == {"city": 'Bad "Ems" }]', "days": 3}
    with client.chat.completions.stream(**asked) as stream:  # puts the pieces together itself
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.content == "On it.\n"
    streamed: Any = final.message.tool_calls
    assert [(c.function.name, c.function.arguments) for c in streamed] == [
        (c.function.name, c.function.arguments) for c in calls
    ]


def test_the_prompt_has_tools_and_earlier_calls(tool_stack: Stack) -> None:
    engine = tool_stack.engine
    engine.script = saying("fine")
    engine.requests.clear()
    call = {"id": "call_1", "type": "function"}
    messages = [
        *USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{**call, "function": {"name": "weather", "arguments": '{"city":"x"}'}}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    answer = post(tool_stack, CHAT, messages=messages, tools=TOOLS).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["message"]["content"] == "fine"
    assert "tool_calls" not in answer["choices"][0]["message"]
    (request,) = engine.requests
    prompt = tiny_tokenizer().decode(request.prompt, False)
    assert '"name": "weather", "arguments": {"city": "x"}' in prompt
    assert "<|user|>rain" in prompt
    assert prompt.startswith("tool weather\ntool now\n")
    assert request.params.grammar is not None
    assert request.params.grammar.kind is GrammarKind.LARK

    post(tool_stack, CHAT, messages=USER, tools=TOOLS, tool_choice="none")
    assert engine.requests[-1].params.grammar is None
    assert "tool weather" not in tiny_tokenizer().decode(engine.requests[-1].prompt, False)
    tokens = post(tool_stack, "/tokenize", messages=messages, tools=TOOLS).json()["tokens"]
    assert tuple(tokens) == request.prompt


def test_both_codecs_give_the_same_calls(tool_stack: Stack, stub: InferenceStub) -> None:
    tool_stack.engine.script = saying(BOTH)
    response = post(tool_stack, CHAT, messages=USER, tools=TOOLS, tool_choice="required")
    over_http = response.json()["choices"][0]
    offered = [
        {"name": "weather", "parameters": json.dumps(SCHEMA)},
        {"name": "now", "description": "Tells the time."},
    ]
    chat = {"messages": USER, "tools": offered, "tool_choice": "required"}
    (choice,) = stub.Generate(request_of(messages=chat), timeout=WAIT_S).choices
    assert choice.finish_info.reason == types_pb2.FINISH_REASON_TOOL_CALLS
    assert over_http["finish_reason"] == "tool_calls"
    assert choice.text == over_http["message"]["content"]
    reported = [call["function"] for call in over_http["message"]["tool_calls"]]
    assert [{"name": c.name, "arguments": c.arguments} for c in choice.tool_calls] == reported
    http_request, grpc_request = tool_stack.engine.requests[-2:]
    assert http_request.params.grammar == grpc_request.params.grammar
    assert http_request.prompt == grpc_request.prompt

    chunks = list(stub.GenerateStream(request_of(messages=chat), timeout=WAIT_S))
    deltas = [delta for chunk in chunks for delta in chunk.tool_calls]
    body = {"messages": USER, "tools": TOOLS, "stream": True, "logprobs": True}
    entries = by_choice(parse_events(post(tool_stack, CHAT, **body).text))[0]
    pieces = [call for entry in entries for call in entry["delta"].get("tool_calls") or ()]
    for place, function in enumerate(reported):
        own = [delta for delta in deltas if delta.index == place]
        assert [delta.name for delta in own if delta.HasField("name")] == [function["name"]]
        assert "".join(delta.arguments for delta in own) == function["arguments"]
        streamed = [piece["function"] for piece in pieces if piece["index"] == place]
        assert "".join(piece["arguments"] for piece in streamed) == function["arguments"]
    assert [e["finish_reason"] for e in entries if e["finish_reason"]] == ["tool_calls"]
    told_tokens = sum(len(e["logprobs"]["content"]) for e in entries if e["logprobs"])
    assert told_tokens == sum(len(chunk.token_ids) for chunk in chunks)
    info = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=WAIT_S)
    assert info.has_tools


@pytest.mark.parametrize("fields", [{"logprobs": True}, {"return_token_ids": True}])
def test_no_chunk_of_a_call_is_empty(tool_stack: Stack, fields: dict[str, Any]) -> None:
    tool_stack.engine.script = saying(BOTH)
    body = {"messages": USER, "tools": TOOLS, "n": 2, "stream": True, **fields}
    choices = by_choice(parse_events(post(tool_stack, CHAT, **body).text))
    expected = [*tiny_tokenizer().encode(BOTH), EOS_ID]
    for opening, *entries in (choices[0], choices[1]):
        assert opening["delta"] == {"role": "assistant", "content": ""}
        assert [e for e in entries if not (e["delta"] or e["finish_reason"])] == []
        if "logprobs" in fields:
            reported = [one["bytes"] for e in entries for one in e["logprobs"]["content"]]
            assert reported == [list(tiny_tokenizer().token_bytes(token)) for token in expected]
        else:
            assert [token for e in entries for token in e["token_ids"]] == expected


def test_a_cut_call_says_length(tool_stack: Stack) -> None:
    tool_stack.engine.script = saying(CUT, end=False)
    body = {
        "messages": USER,
        "tools": TOOLS,
        "max_tokens": len(tiny_tokenizer().encode(CUT)),
    }
    (choice,) = post(tool_stack, CHAT, **body).json()["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["tool_calls"][0]["function"]["arguments"] == ARGUMENTS[:20]
    assert choice["message"]["content"] is None


@pytest.mark.parametrize(
    ("kept", "arguments"),
    [
        (len(FIRST) + len("\n<tool_call>\n{"), None),
        (len(FIRST) + len('\n<tool_call>\n{"name": "no'), ""),
        (len(FIRST) + len('\n<tool_call>\n{"name": "now", "argu'), ""),
        (len(f"{FIRST}\n{SECOND}") - len("}}\n</tool_call>"), "{"),
    ],
    ids=["no name", "part of a name", "name", "arguments"],
)
@pytest.mark.parametrize("choice", ["required", "auto"])
def test_a_second_call_that_is_cut_is_told_as_far_as_it_came(
    tool_stack: Stack, kept: int, arguments: str | None, choice: str
) -> None:
    """Whole calls stay whole, and all protocols say that the limit cut the answer."""
    text = f"{FIRST}\n{SECOND}"[:kept]
    if choice == "auto" and arguments != "{":
        return  # the beginning of a call is text, where text is allowed
    tool_stack.engine.script = saying(text, end=False)
    most = len(tiny_tokenizer().encode(text))
    whole = ("weather", ARGUMENTS)
    expected = [whole] if arguments is None else [whole, ("now", arguments)]

    body: dict[str, Any] = {"messages": USER, "tools": TOOLS, "tool_choice": choice}
    body["max_tokens"] = most
    (told,) = post(tool_stack, CHAT, **body).json()["choices"]
    calls = [call["function"] for call in told["message"]["tool_calls"]]
    assert [(call["name"], call["arguments"]) for call in calls] == expected
    assert told["finish_reason"] == "length"
    entries = by_choice(parse_events(post(tool_stack, CHAT, **body, stream=True).text))[0]
    pieces = [call for entry in entries for call in entry["delta"].get("tool_calls") or ()]
    for place, (name, said) in enumerate(expected):
        own = [piece["function"] for piece in pieces if piece["index"] == place]
        assert [one["name"] for one in own if "name" in one] == [name]
        assert "".join(one["arguments"] for one in own) == said
    assert {piece["index"] for piece in pieces} == set(range(len(expected)))
    assert [e["finish_reason"] for e in entries if e["finish_reason"]] == ["length"]

    functions: list[Any] = [tool["function"] for tool in TOOLS]
    flat = [{"type": "function", **function} for function in functions]
    asked = {"input": "hi", "tools": flat, "tool_choice": choice, "max_output_tokens": most}
    response = post(tool_stack, "/v1/responses", **asked).json()
    items = [(one["name"], one["arguments"], one["status"]) for one in response["output"]]
    ends = ["completed", "incomplete"]
    assert items == [(*one, end) for one, end in zip(expected, ends, strict=False)]
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}

    named = [{"name": f["name"], "input_schema": f.get("parameters", {})} for f in functions]
    kind = {"required": "any", "auto": "auto"}[choice]
    wanted: dict[str, Any] = {"model": MODEL, "messages": USER, "max_tokens": most}
    wanted |= {"tools": named, "tool_choice": {"type": kind}}
    message = post(tool_stack, "/v1/messages", **wanted).json()
    blocks = [(block["name"], block["input"]) for block in message["content"]]
    inputs = [json.loads(ARGUMENTS), {}]
    assert blocks == [(name, i) for (name, _), i in zip(expected, inputs, strict=False)]
    assert message["stop_reason"] == "max_tokens"


@pytest.mark.parametrize("ending", [{"max_tokens": 5}, {"stop": ["_c"]}])
@pytest.mark.parametrize(
    ("choice", "is_kept"),
    [
        ("required", False),
        ({"type": "function", "function": {"name": "weather"}}, False),
        ("auto", True),
    ],
)
def test_the_mark_of_a_cut_call(
    tool_stack: Stack, stub: InferenceStub, ending: dict[str, Any], choice: Any, is_kept: bool
) -> None:
    tool_stack.engine.script = saying(FIRST)
    text = "<tool" if is_kept else ""
    body = {"messages": USER, "tools": TOOLS, "tool_choice": choice, **ending}
    (whole,) = post(tool_stack, CHAT, **body).json()["choices"]
    assert whole["message"]["content"] == text
    assert "tool_calls" not in whole["message"]
    entries = by_choice(parse_events(post(tool_stack, CHAT, **body, stream=True).text))[0]
    assert "".join(entry["delta"].get("content", "") for entry in entries) == text
    chat: dict[str, Any] = {"messages": USER, "tools": [{"name": "weather"}]}
    chat |= {"tool_choice": choice} if isinstance(choice, str) else {"tool_name": "weather"}
    message = request_of(messages=chat, sampling_params=ending)
    assert stub.Generate(message, timeout=WAIT_S).choices[0].text == text
    chunks = stub.GenerateStream(message, timeout=WAIT_S)
    assert "".join(chunk.text for chunk in chunks) == text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": TOOLS, "tool_choice": "always"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"messages": [*USER, {"role": "assistant", "tool_calls": [BROKEN_CALL]}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
    ],
)
def test_wrong_tool_fields(tool_stack: Stack, fields: dict[str, Any], param: str) -> None:
    response = post(tool_stack, CHAT, **{"messages": USER, **fields})
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    ("arguments", "rule"), [("{bad", "must be JSON text"), ("[]", "must be the JSON text of an ob")]
)
def test_both_codecs_name_the_call_with_wrong_arguments(
    tool_stack: Stack, stub: InferenceStub, arguments: str, rule: str
) -> None:
    called = [{"name": "now", "arguments": "{}"}, {"name": "now", "arguments": arguments}]
    earlier = {"role": "assistant", "tool_calls": [{"function": one} for one in called]}
    error = post(tool_stack, CHAT, messages=[*USER, earlier]).json()["error"]
    path = "messages[1].tool_calls[1].function.arguments"
    assert error["param"] == path
    assert error["message"].startswith(f"{path} {rule}")
    message = request_of(messages={"messages": [*USER, {**earlier, "tool_calls": called}]})
    _, reported, details = failure(lambda: stub.Generate(message, timeout=WAIT_S))
    assert reported == error["message"]
    assert details["BadRequest"].field_violations[0].field == path


def test_models_without_tools_refuse_them(stack: Stack) -> None:
    response = post(stack, CHAT, messages=USER, tools=TOOLS)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["code"]) == ("tools", "unsupported_parameter")
    assert post(stack, CHAT, messages=USER, tools=[], tool_choice="auto").status_code == 200
    assert post(stack, CHAT, messages=USER, tools=TOOLS, tool_choice="none").status_code == 200
    with grpc.insecure_channel(stack.grpc_target) as channel:
        message = request_of(messages={"messages": USER, "tools": [{"name": "now"}]})
        code, _, details = failure(lambda: InferenceStub(channel).Generate(message))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert details["BadRequest"].field_violations[0].field == "tools"
