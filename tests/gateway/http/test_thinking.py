"""Reasoning between ``<think>`` and ``</think>``, as clients of both codecs see it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from gateway.core.tool_use import ToolCallFormat
from gateway.text.chat_template import ChatTemplate
from gateway.text.tokenizer import Tokenizer
from protos.inference_pb2_grpc import InferenceStub
from tests.gateway.fakes import saying, tiny_backend, tiny_tokenizer
from tests.gateway.grpc.test_grpc import request_of
from tests.gateway.sse_client import by_choice, parse_events
from tests.gateway.stack import WAIT_S, Stack, post, running_stack
from tests.gateway.text.tool_formats.examples import written
from workers.requests.request import GrammarKind

TEMPLATE = (
    "{% if tools %}tools in <tool_call><arg_key>{% endif %}{% for message in messages %}"
    "<|{{ message.role }}|>"
    "{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}"
    "{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined %}"
    "{{ '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
"""As GLM's and Qwen's templates do it, in short."""
USER = [{"role": "user", "content": "hi"}]
ANSWER = "\nHm, <tool_call> or not?\n</think>\n\nOn it."
TOOLS = [{"type": "function", "function": {"name": "now"}}]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def thinking_stack() -> Iterator[Stack]:
    """A gateway whose model reasons before it answers."""
    with running_stack(tokenizer=tiny_tokenizer(TEMPLATE)) as stack:
        yield stack


def ask(stack: Stack, enable_thinking: bool | None, **fields: Any) -> dict[str, Any]:
    """The one choice of a chat."""
    given = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    body = {"messages": USER, "chat_template_kwargs": given, **fields}
    response = post(stack, CHAT, **body)
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    (streamed,) = by_choice(parse_events(post(stack, CHAT, **body, stream=True).text)).values()
    for name in ("reasoning_content", "content"):
        pieces = "".join(entry["delta"].get(name) or "" for entry in streamed)
        assert pieces == (choice["message"].get(name) or "")
    assert [e["finish_reason"] for e in streamed if e["finish_reason"]] == [choice["finish_reason"]]
    return dict(choice["message"])


@pytest.mark.parametrize(
    ("enable_thinking", "said", "reasoning", "content"),
    [
        (True, ANSWER, "Hm, <tool_call> or not?", "On it."),
        (None, f"<think>{ANSWER}", "Hm, <tool_call> or not?", "On it."),
        (None, "On it.", None, "On it."),
        (False, "On it. <think>", None, "On it. <think>"),
        (True, "Hm", "Hm", ""),
    ],
)
def test_chats_have_reasoning_apart(
    thinking_stack: Stack,
    enable_thinking: bool | None,
    said: str,
    reasoning: str | None,
    content: str,
) -> None:
    thinking_stack.engine.script = saying(said)
    message = ask(thinking_stack, enable_thinking)
    assert (message.get("reasoning_content"), message["content"]) == (reasoning, content)


def test_calls_follow_reasoning(thinking_stack: Stack) -> None:
    call = written(ToolCallFormat.GLM, [("now", {})])
    thinking_stack.engine.script = saying(f"{ANSWER}\n{call}")
    message = ask(thinking_stack, True, tools=TOOLS)
    assert message["reasoning_content"] == "Hm, <tool_call> or not?"
    assert message["content"] == "On it.\n"
    assert [one["function"]["name"] for one in message["tool_calls"]] == ["now"]


def test_both_codecs_have_it(thinking_stack: Stack) -> None:
    thinking_stack.engine.script = saying(ANSWER)
    chat = {"messages": USER, "chat_template_kwargs": {"enable_thinking": True}}
    with grpc.insecure_channel(thinking_stack.grpc_target) as channel:
        answer = InferenceStub(channel).Generate(request_of(messages=chat), timeout=WAIT_S)
    (choice,) = answer.choices
    message = ask(thinking_stack, True)
    assert (choice.reasoning, choice.text) == (message["reasoning_content"], message["content"])


def test_structured_output_is_for_what_follows(thinking_stack: Stack) -> None:
    engine = thinking_stack.engine
    engine.script = saying("\nHm.</think>\n3")
    schema = {"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}
    for enable_thinking, kind in (
        (True, GrammarKind.LARK),
        (None, GrammarKind.LARK),
        (False, GrammarKind.JSON_SCHEMA),
    ):
        ask(thinking_stack, enable_thinking, response_format=schema)
        grammar = engine.requests[-1].params.grammar
        assert grammar is not None
        assert (grammar.kind, grammar.field) == (kind, "response_format.json_schema.schema")
    assert ask(thinking_stack, True, response_format=schema)["content"] == "3"


def test_what_a_cut_prompt_and_a_continued_message_say(thinking_stack: Stack) -> None:
    """The end of what the model reads decides."""
    stack = thinking_stack
    stack.engine.script = saying("b</think>c")
    kept = {"chat_template_kwargs": {"enable_thinking": True}, "truncate_prompt_tokens": 30}
    for side, content in (("left", "c"), ("right", "b</think>c")):
        body = {"messages": [{"role": "user", "content": "x" * 40}], **kept}
        response = post(stack, CHAT, **body, truncation_side=side)
        assert response.json()["choices"][0]["message"]["content"] == content
    whole = "b</think>c"
    for last, content in (("<think>a", "c"), ("<think>a</think>x", whole), ("x", whole)):
        messages = [*USER, {"role": "assistant", "content": last}]
        response = post(stack, CHAT, messages=messages, continue_final_message=True)
        assert response.json()["choices"][0]["message"]["content"] == content


def test_completions_have_no_reasoning(thinking_stack: Stack) -> None:
    thinking_stack.engine.script = saying("<think>a</think>b")
    (choice,) = post(thinking_stack, "/v1/completions", prompt="x", max_tokens=40).json()["choices"]
    assert choice["text"] == "<think>a</think>b"


def test_marks_that_are_special_tokens_are_seen() -> None:
    """Special tokens are left out of other answers."""
    backend = tiny_backend()
    backend.add_special_tokens(["<think>", "</think>"])
    tokenizer = Tokenizer(backend, ChatTemplate(TEMPLATE))
    ids = tokenizer.encode("a</think>b", add_special_tokens=False)
    with running_stack(tokenizer=tokenizer) as stack:
        stack.engine.script = lambda request, choice: [*ids]
        message = ask(stack, True, max_tokens=len(ids))
        assert (message["reasoning_content"], message["content"]) == ("a", "b")
        message = ask(stack, False, max_tokens=len(ids))
        assert (message.get("reasoning_content"), message["content"]) == (None, "ab")
