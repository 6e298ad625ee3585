"""Tools with ``defer_loading``, and references to them in results of tools."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.core.errors import RequestError
from gateway.anthropic import deferred
from gateway.core.tool_use import ToolUse
from tests.gateway.anthropic.test_convert import convert

SEARCH = {"name": "search", "input_schema": {"type": "object"}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
LATE = {
    "name": "late",
    "description": "Däy.",
    "input_schema": SCHEMA,
    "defer_loading": True,
}
OTHER = {"name": "other", "input_schema": {"type": "object"}, "defer_loading": True}
TOOLS = [OTHER, SEARCH, LATE]
USER = {"role": "user", "content": "hi"}
SHOWN = (
    '<function>{"description": "Däy.", "name": "late", "parameters": '
    '{"type": "object", "properties": {"city": {"type": "string"}}}}</function>'
)


def found(*blocks: dict[str, Any]) -> list[dict[str, Any]]:
    """A conversation in which the model has looked for tools."""
    call = {"type": "tool_use", "id": "1", "name": "search", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "1", "content": list(blocks)}
    return [
        USER,
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]


def reference(name: str) -> dict[str, Any]:
    return {"type": "tool_reference", "tool_name": name}


def use_of(**fields: Any) -> ToolUse:
    use = convert(tools=TOOLS, **fields).tools
    assert use is not None
    return use


def names(use: ToolUse) -> tuple[list[str], list[str]]:
    """Those that may be called, and those that the template shows."""
    shown = [entry["function"]["name"] for entry in use.for_template()]
    return [tool.name for tool in use.allowed], shown


def test_what_nobody_has_looked_for_is_not_there() -> None:
    assert names(use_of()) == (["search"], ["search"])
    with pytest.raises(RequestError, match="names 'late', which is not among tools"):
        use_of(tool_choice={"type": "tool", "name": "late"})


def test_a_reference_shows_its_tool_where_it_is() -> None:
    text = {"type": "text", "text": "One:"}
    fields = convert(tools=TOOLS, messages=found(text, reference("late")))
    assert fields.tools is not None
    assert names(fields.tools) == (["search", "late"], ["search"])
    assert fields.chat is not None
    result = fields.chat.messages[-1]
    assert result["content"] == f"One:\n<functions>\n{SHOWN}\n</functions>"


def test_references_that_follow_each_other_are_one_list() -> None:
    fields = convert(tools=TOOLS, messages=found(reference("late"), reference("other")))
    assert fields.chat is not None
    first, *lines, last = fields.chat.messages[-1]["content"].split("\n")
    assert (first, len(lines), last) == ("<functions>", 2, "</functions>")
    assert names(fields.tools or ToolUse(tools=()))[0] == ["other", "search", "late"]


def test_the_prompt_before_a_reference_stays_the_same() -> None:
    before, after = use_of(), use_of(messages=found(reference("late")))
    assert before.for_template() == after.for_template()


@pytest.mark.parametrize(
    ("block", "param"),
    [
        (reference("never"), "messages[2].content[0].content[0].tool_name"),
        ({"type": "tool_reference"}, "messages[2].content[0].content[0].tool_name"),
        ({"type": "image"}, "messages[2].content[0].content[0].type"),
    ],
)
def test_wrong_references_are_refused(block: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        convert(tools=TOOLS, messages=found(block))
    assert caught.value.param == param


def test_a_reference_elsewhere_is_refused() -> None:
    with pytest.raises(RequestError) as caught:
        convert(tools=TOOLS, messages=[{"role": "user", "content": [reference("late")]}])
    assert caught.value.param == "messages[0].content[0].type"


def test_errors_name_the_place_among_all_tools() -> None:
    wrong = {**SEARCH, "name": "a b"}
    with pytest.raises(RequestError) as caught:
        convert(tools=[LATE, wrong])
    assert caught.value.param == "tools[1].name"


def test_references_count_as_often_as_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short body may name a long tool many times: its text is counted before it is repeated."""
    monkeypatch.setattr(deferred, "MAX_REFERENCED_CHARS", 3 * len(SHOWN))
    convert(tools=TOOLS, messages=found(*[reference("late")] * 3))
    monkeypatch.setattr(deferred, "render_references", lambda *_: pytest.fail("it was repeated"))
    with pytest.raises(RequestError) as caught:
        convert(tools=TOOLS, messages=found(*[reference("late")] * 4))
    most = 3 * len(SHOWN)
    rule = f"refer to tools of {4 * len(SHOWN)} characters, at most {most} are allowed"
    assert (caught.value.param, caught.value.message) == ("messages", f"messages {rule}")
