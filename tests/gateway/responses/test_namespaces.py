"""Tools of namespaces, in which Codex sends those of MCP servers and of its agents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from cluster.core.errors import RequestError
from gateway.core.tool_use import ToolCallFormat
from tests.gateway.fakes import saying, tiny_tokenizer
from tests.gateway.responses.streams import PATH, both, respond
from tests.gateway.responses.test_input import messages_of, turn_of
from tests.gateway.stack import Stack, post, running_stack
from tests.gateway.text.tool_formats.examples import written
from tests.gateway.text.tool_formats.test_tools import TEMPLATE

READ = {"type": "function", "name": "read", "description": "Reads a file."}
PATCH = {"type": "custom", "name": "patch"}
FILES = {
    "type": "namespace",
    "name": "mcp__files",
    "description": "Files of the project.",
    "tools": [READ, PATCH],
}
OWN_READ = {"type": "function", "name": "read"}


@pytest.fixture(scope="module")
def model() -> Iterator[Stack]:
    with running_stack(tokenizer=tiny_tokenizer(TEMPLATE)) as stack:
        yield stack


def refused(**body: Any) -> str | None:
    """The field that a body is refused for."""
    with pytest.raises(RequestError) as caught:
        turn_of(**body)
    return caught.value.param


def call(name: str, arguments: dict[str, Any]) -> str:
    return written(ToolCallFormat.HERMES, [(name, arguments)])


def test_the_model_sees_a_name_of_both() -> None:
    use = turn_of(input="x", tools=[OWN_READ, FILES]).call.tools
    assert use is not None
    shown = [(tool.name, tool.description) for tool in use.tools]
    assert shown == [
        ("read", None),
        ("mcp__files__read", "Files of the project.\nReads a file."),
        ("mcp__files__patch", None),
    ]


def test_calls_name_them_apart(model: Stack) -> None:
    two = [call("mcp__files__read", {}), call("read", {})]
    model.engine.script = saying("\n".join([*two, call("mcp__files__patch", {"input": "a\n"})]))
    response = both(model, input="x", tools=[OWN_READ, FILES])
    known = [
        (item["type"], item["name"], item.get("namespace"), item.get("input"))
        for item in response["output"]
    ]
    assert known == [
        ("function_call", "read", "mcp__files", None),
        ("function_call", "read", None, None),
        ("custom_tool_call", "patch", "mcp__files", "a\n"),
    ]
    shown = response["tools"][1]
    assert (shown["type"], shown["name"]) == ("namespace", "mcp__files")
    assert [tool["name"] for tool in shown["tools"]] == ["read", "patch"]


def test_a_conversation_goes_on_with_such_calls(model: Stack) -> None:
    calls = [
        {"type": "function_call", "call_id": "1", "name": "read", "namespace": "mcp__files"},
        {"type": "custom_tool_call", "call_id": "2", "name": "patch", "namespace": "mcp__files"},
    ]
    calls[0]["arguments"], calls[1]["input"] = "{}", "a"
    outputs = [
        {"type": "function_call_output", "call_id": "1", "output": "text"},
        {"type": "custom_tool_call_output", "call_id": "2", "output": "done"},
    ]
    asked, *_ = messages_of(*calls, *outputs, tools=[FILES])
    names = [one["function"]["name"] for one in asked["tool_calls"]]
    assert names == ["mcp__files__read", "mcp__files__patch"]
    model.engine.script = saying("fine")
    respond(model, input=[*calls, *outputs], tools=[FILES])


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([{**FILES, "name": None}], "tools[0].name"),
        ([{**FILES, "name": ""}], "tools[0].name"),
        ([{**FILES, "name": "a b"}], "tools[0].tools[0].name"),
        ([READ, {**FILES, "tools": [READ, READ]}], "tools[1].tools[1].name"),
        ([{**FILES, "tools": [FILES]}], "tools[0].tools[0].type"),
        ([{**FILES, "tools": [{"type": "web_search"}]}], "tools[0].tools[0].type"),
        ([{**FILES, "tools": [{"type": "function"}]}], "tools[0].tools[0].name"),
        ([{"type": "function", "name": "mcp__files__read"}, FILES], "tools[1].tools[0].name"),
        (
            [{**FILES, "tools": [{**READ, "parameters": {"type": "array"}}]}],
            "tools[0].tools[0].parameters",
        ),
    ],
)
def test_wrong_namespaces_are_refused(tools: list[dict[str, Any]], param: str) -> None:
    assert refused(input="x", tools=tools) == param


def test_what_is_not_built_is_refused_in_them_too(stack: Stack) -> None:
    late = {**FILES, "tools": [{**READ, "defer_loading": True}]}
    answer = post(stack, PATH, input="x", tools=[late])
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tools[0].tools[0].defer_loading"


def test_no_tools_in_a_namespace_are_no_tools(stack: Stack) -> None:
    stack.engine.script = saying("x")
    respond(stack, input="x", tools=[{**FILES, "tools": []}])


def test_an_empty_namespace_of_a_call_is_refused() -> None:
    item = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "", "namespace": ""}
    assert refused(input=[item]) == "input[0].namespace"
