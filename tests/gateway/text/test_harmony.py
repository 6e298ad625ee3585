"""Answers in the Harmony format: what of them is reasoning, words for the user, and calls.

The examples are those of "Harmony response format" (OpenAI, 2025).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import tokenizers

from cluster.core.errors import RequestError
from gateway.core.tool_use import Tool, ToolForm, ToolUse
from gateway.text.chat_template import ChatTemplate
from gateway.text.harmony import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    MESSAGE,
    RETURN,
    START,
    HarmonyParser,
)
from gateway.text.tools import harmony_grammar
from protos import types_pb2
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.fakes import EOS_ID, saying, tiny_backend, tiny_tokenizer
from tests.gateway.grpc.test_grpc import request_of
from tests.gateway.sse_client import by_choice, parse_events
from tests.gateway.stack import WAIT_S, Stack, post, running_stack
from tests.gateway.text.test_tools import CHAT, OFFERED, TOOLS, USER
from workers.requests.request import Grammar, GrammarKind
from workers.sampling.grammar_compiler import GrammarCompiler

SUM = (
    '<|channel|>analysis<|message|>User asks: "What is 2 + 2?" Simple arithmetic. Provide answer.'
    "<|end|><|start|>assistant<|channel|>final<|message|>2 + 2 = 4.<|return|>"
)
WEATHER = (
    "<|channel|>analysis<|message|>Need to use function get_weather.<|end|><|start|>assistant"
    "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    '{"location":"San Francisco"}<|call|>'
)
PLAN = (
    "<|channel|>analysis<|message|>{long chain of thought}<|end|><|start|>assistant<|channel|>"
    "commentary<|message|>**Action plan**:\n1. Generate an HTML file\n---\nWill start<|end|>"
    "<|start|>assistant<|channel|>commentary to=functions.generate_file<|constrain|>json<|message|>"
    '{"template": "basic_html", "path": "index.html"}<|call|>'
)
ROLE_FIRST = (
    "<|channel|>analysis<|message|>Run it.<|end|><|start|>assistant to=functions.python<|channel|>"
    'commentary<|message|>{"code": "1 < 2"}<|call|>'
)
FIND = (
    "<|channel|>analysis<|message|>Let me look.<|end|><|start|>assistant to=browser.search"
    '<|channel|>analysis<|message|>{"q":1}'
)
ARGUMENTS = '{"template": "basic_html", "path": "index.html"}'
Call = tuple[str, str]


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        (SUM, 'User asks: "What is 2 + 2?" Simple arithmetic. Provide answer.', "2 + 2 = 4.", []),
        (
            WEATHER,
            "Need to use function get_weather.",
            "",
            [("get_weather", '{"location":"San Francisco"}')],
        ),
        (
            PLAN,
            "{long chain of thought}",
            "**Action plan**:\n1. Generate an HTML file\n---\nWill start",
            [("generate_file", ARGUMENTS)],
        ),
        (ROLE_FIRST, "Run it.", "", [("python", '{"code": "1 < 2"}')]),
        (FIND, 'Let me look.{"q":1}', "", []),
        ("<|channel|>final<|message|>a <|en", "", "a <|en", []),
        ("<|message|>Hi", "", "Hi", []),
        ("Two plus two, <b>4</b>", "", "Two plus two, <b>4</b>", []),
        ("<|channel|>anal", "", "", []),
        ("", "", "", []),
    ],
)
def test_messages_are_found_however_the_text_is_cut(
    text: str, reasoning: str, content: str, calls: list[Call]
) -> None:
    for size in (1, 2, 3, 7, 1000):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert parsed(pieces) == (reasoning, content, calls), size
    # The mark at the end is where the model stops, and not part of the answer.
    for mark in (RETURN, CALL):
        if text.endswith(mark):
            assert parsed([text.removesuffix(mark)]) == (reasoning, content, calls)


def parsed(pieces: list[str]) -> tuple[str, str, list[Call]]:
    """Reasoning, content and calls of an answer that came in pieces."""
    parser = HarmonyParser()
    found = [*(parser.feed(piece) for piece in pieces), parser.feed("", is_last=True)]
    deltas = [delta for one in found for delta in one.calls]
    calls = [
        (first.name, "".join(d.arguments for d in deltas if d.index == first.index))
        for first in deltas
        if first.name is not None
    ]
    assert all((delta.call_id is None) is (delta.name is None) for delta in deltas)
    assert parser.has_calls is bool(calls)
    return "".join(one.reasoning for one in found), "".join(one.content for one in found), calls


def test_random_answers_are_the_same_in_any_pieces() -> None:
    """Of marks and words in any order: nothing raises, and nothing depends on the cuts."""
    draw = random.Random(0)
    parts = [
        CHANNEL,
        MESSAGE,
        CONSTRAIN,
        START,
        END,
        RETURN,
        CALL,
        "assistant",
        "analysis",
        "final",
    ]
    parts += ["commentary", " to=functions.f ", "json", '{"a": 1}', "<", "<|", "words ", "é"]
    for _ in range(2000):
        text = "".join(draw.choices(parts, k=draw.randrange(12)))
        cuts = sorted(draw.randrange(len(text) + 1) for _ in range(draw.randrange(6)))
        bounds = [0, *cuts, len(text)]
        pieces = [text[a:b] for a, b in itertools.pairwise(bounds)]
        assert parsed(pieces) == parsed([text]), text


# ---- the grammar ----------------------------------------------------------------------------

MARKS = (CHANNEL, MESSAGE, CONSTRAIN, START, END, CALL)


@pytest.fixture(scope="module")
def backend() -> tokenizers.Tokenizer:
    """The vocabulary of the tests, and the format's marks."""
    made = tiny_backend()
    made.add_special_tokens([*MARKS])
    return made


@pytest.fixture(scope="module")
def compiler(
    backend: tokenizers.Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> GrammarCompiler:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    return GrammarCompiler(folder, backend.get_vocab_size(), [EOS_ID])


THOUGHT = f"{CHANNEL}analysis{MESSAGE}Well, f(x) <y>.{END}{START}assistant"
FINAL = f"{CHANNEL}final{MESSAGE}Fine."


def call(name: str, arguments: str) -> str:
    return f"{CHANNEL}commentary to=functions.{name} {CONSTRAIN}json{MESSAGE}{arguments}{CALL}"


NOW, RAIN = call("now", "{}"), call("weather", '{"city": "x", "days": 3}')
ANSWER = Grammar(kind=GrammarKind.JSON_SCHEMA, text='{"type":"integer"}', field="response_format")
WORDS = Grammar(kind=GrammarKind.REGEX, text="a", field="structured_outputs.regex")


@pytest.mark.parametrize(
    ("use", "answer", "good", "bad"),
    [
        (
            ToolUse(tools=OFFERED),
            None,
            [FINAL, THOUGHT + FINAL, THOUGHT + NOW, NOW, THOUGHT * 2 + RAIN],
            ["no channel", call("never", "{}"), call("weather", "{}"), THOUGHT, NOW + FINAL],
        ),
        (ToolUse(tools=OFFERED, must_call=True), None, [NOW, THOUGHT + RAIN], [FINAL]),
        (ToolUse(tools=OFFERED, must_call=True, only="now"), None, [NOW], [RAIN]),
        (
            ToolUse(tools=OFFERED),
            ANSWER,
            [f"{CHANNEL}final{MESSAGE}17", THOUGHT + NOW],
            [FINAL, "17"],
        ),
        (None, ANSWER, [f"{THOUGHT}{CHANNEL}final{MESSAGE}17"], [THOUGHT + FINAL, NOW]),
    ],
)
def test_answers_follow_the_tools(
    backend: tokenizers.Tokenizer,
    compiler: GrammarCompiler,
    use: ToolUse | None,
    answer: Grammar | None,
    good: list[str],
    bad: list[str],
) -> None:
    special = {mark: backend.get_vocab()[mark] for mark in MARKS}
    grammar = harmony_grammar(use, special, answer)
    assert grammar is not None
    assert [text for text in good if not accepts(backend, compiler, grammar, text)] == []
    assert [text for text in bad if accepts(backend, compiler, grammar, text)] == []


def accepts(
    backend: tokenizers.Tokenizer, compiler: GrammarCompiler, grammar: Grammar, text: str
) -> bool:
    """Whether an answer may be ``text``, as a whole."""
    state = compiler.compile(grammar).start()
    for token in [*backend.encode(text, add_special_tokens=False).ids, EOS_ID]:
        if not bool(state.mask().allowed[token]):
            return False
        state.advance(token)
    return True


def test_what_has_no_grammar_of_its_own() -> None:
    assert harmony_grammar(None, {}, None) is None
    assert harmony_grammar(None, {}, ANSWER) is ANSWER
    assert harmony_grammar(None, dict.fromkeys(MARKS, 1), WORDS) is WORDS
    assert harmony_grammar(ToolUse(tools=OFFERED), {}, None) is None
    with pytest.raises(RequestError, match="tool_choice needs a model with its own marks"):
        harmony_grammar(ToolUse(tools=OFFERED, must_call=True), {}, None)
    with pytest.raises(RequestError, match=r"structured_outputs\.regex cannot go with tools"):
        harmony_grammar(ToolUse(tools=OFFERED), dict.fromkeys(MARKS, 1), WORDS)
    large = Tool(name="f", parameters={"properties": {"x" * 10**6: {}}})
    with pytest.raises(RequestError, match="bytes of schemas"):
        harmony_grammar(ToolUse(tools=(large,)), dict.fromkeys(MARKS, 1), None)


# ---- both codecs ----------------------------------------------------------------------------

TEMPLATE = (
    "{% if tools %}<|start|>developer<|message|>{{ tools[0].function.name }}<|end|>{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}"
    "{% if m.role == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m.content }}<|end|>"
    "{% endfor %}<|start|>assistant"
)


@pytest.fixture(scope="module")
def harmony(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """A gateway whose model answers in the format."""
    assert ChatTemplate(TEMPLATE).tool_form is ToolForm.HARMONY
    with running_stack(tokenizer=tiny_tokenizer(TEMPLATE)) as stack:
        yield stack


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_both_codecs_tell_reasoning_apart(harmony: Stack, tools: Any) -> None:
    harmony.engine.script = saying(SUM)
    more = {} if tools is None else {"tools": tools}
    (choice,) = post(harmony, CHAT, messages=USER, **more).json()["choices"]
    message = choice["message"]
    assert (choice["finish_reason"], message["content"]) == ("stop", "2 + 2 = 4.")
    assert message["reasoning_content"].startswith("User asks: ")
    body = {"messages": USER, "stream": True, **more}
    entries = by_choice(parse_events(post(harmony, CHAT, **body).text))[0]
    for name in ("content", "reasoning_content"):
        assert "".join(e["delta"].get(name, "") for e in entries) == message[name]
    with grpc.insecure_channel(harmony.grpc_target) as channel:
        stub = InferenceStub(channel)
        (answer,) = stub.Generate(request_of(messages={"messages": USER}), timeout=WAIT_S).choices
        found = (answer.text, answer.reasoning)
        chunks = list(stub.GenerateStream(request_of(messages={"messages": USER}), timeout=WAIT_S))
    assert found == (message["content"], message["reasoning_content"])
    assert "".join(chunk.text for chunk in chunks) == message["content"]
    assert "".join(chunk.reasoning for chunk in chunks) == message["reasoning_content"]


def test_both_codecs_give_its_calls(harmony: Stack) -> None:
    harmony.engine.script = saying(PLAN)
    (choice,) = post(harmony, CHAT, messages=USER, tools=TOOLS).json()["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"].startswith("**Action plan**")
    (called,) = (entry["function"] for entry in message["tool_calls"])
    assert called == {"name": "generate_file", "arguments": ARGUMENTS}
    with grpc.insecure_channel(harmony.grpc_target) as channel:
        chat = {"messages": USER, "tools": [{"name": "now"}]}
        stub = InferenceStub(channel)
        (answer,) = stub.Generate(request_of(messages=chat), timeout=WAIT_S).choices
    assert answer.finish_info.reason == types_pb2.FINISH_REASON_TOOL_CALLS
    assert [(c.name, c.arguments) for c in answer.tool_calls] == [("generate_file", ARGUMENTS)]
    assert answer.reasoning == "{long chain of thought}"
