"""anthropic-python: messages whole and streamed, calls of tools, structured output, errors."""

from __future__ import annotations

import asyncio
import sys
from typing import Literal

import anthropic
from pydantic import BaseModel

url, model = sys.argv[1:]
client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0)
asked = {"model": model, "messages": [{"role": "user", "content": "Who is there?"}]}


class LookUp(BaseModel):
    word: Literal["king", "queen"]


schema = LookUp.model_json_schema()
tool = {"name": "look_up", "description": "Looks a word up.", "input_schema": schema}
system = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]

sampling = {"temperature": 0.5, "top_k": 9, "top_p": 0.9}
message = client.messages.create(**asked, system=system, max_tokens=8, extra_body=sampling)
assert message.type == "message"
assert message.id.startswith("msg_")
assert message.stop_reason in ("end_turn", "max_tokens")
assert message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0) > 0
assert message.usage.output_tokens <= 8
count = client.messages.count_tokens(**asked, system=system)
assert count.input_tokens == message.usage.input_tokens + message.usage.cache_read_input_tokens

greedy = {"temperature": 0.0}
same = {**asked, "max_tokens": 8, "stop_sequences": ["\n\n\n"], "extra_body": greedy}
whole = client.messages.create(**same)
with client.messages.stream(**same) as stream:
    text = "".join(stream.text_stream)
    final = stream.get_final_message()
assert [block.text for block in final.content] == [block.text for block in whole.content]
assert text == "".join(block.text for block in whole.content)
assert final.usage.output_tokens == whole.usage.output_tokens
assert final.stop_reason == whole.stop_reason

choice = {"type": "any", "disable_parallel_tool_use": True}
calling = {**asked, "max_tokens": 300, "tools": [tool], "tool_choice": choice}
with client.messages.stream(**calling) as stream:
    streamed = stream.get_final_message()
for answer in (client.messages.create(**calling), streamed):
    assert answer.stop_reason == "tool_use", answer
    (call,) = [block for block in answer.content if block.type == "tool_use"]
    assert LookUp.model_validate(call.input)
    turns = [
        *asked["messages"],
        {"role": "assistant", "content": answer.content},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": call.id, "content": "a man"},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    client.messages.create(model=model, messages=turns, tools=[tool], max_tokens=8)
named = {"type": "tool", "name": "look_up", "disable_parallel_tool_use": True}
assert client.messages.create(**{**calling, "tool_choice": named}).stop_reason == "tool_use"

parsed = client.messages.parse(**asked, max_tokens=300, output_format=LookUp)
assert parsed.parsed_output.word in ("king", "queen")
thinking = {"type": "enabled", "budget_tokens": 1024}
client.messages.create(**asked, max_tokens=1030, thinking=thinking, stop_sequences=["e"])

# ---- as Claude Code does it: the session in metadata, betas, tools that are looked for ----------

hour = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
session = {"user_id": '{"device_id": "d", "session_id": "a-session"}'}
find = {"name": "find", "input_schema": {"type": "object", "properties": {}}, **hour}
late = {**tool, "defer_loading": True}
found = [
    *asked["messages"],
    {
        "role": "assistant",
        "content": [{"type": "tool_use", "id": "1", "name": "find", "input": {}}],
    },
    {
        "role": "user",
        "content": [
            {
                "type": "tool_result",
                "tool_use_id": "1",
                "content": [{"type": "tool_reference", "tool_name": "look_up"}],
                **hour,
            }
        ],
    },
]
with client.beta.messages.stream(
    model=model,
    max_tokens=300,
    messages=found,
    system=[{"type": "text", "text": "Be brief.", **hour}],
    tools=[find, late],
    tool_choice={"type": "tool", "name": "look_up", "disable_parallel_tool_use": True},
    metadata=session,
    betas=["claude-code-20250219", "advanced-tool-use-2025-11-20"],
) as stream:
    kinds = {event.type for event in stream}
    message = stream.get_final_message()
assert {"message_start", "content_block_start", "input_json", "message_stop"} <= kinds, kinds
assert message.stop_reason == "tool_use"
assert LookUp.model_validate(message.content[-1].input)
counted = client.messages.count_tokens(model=model, messages=asked["messages"], tools=[tool])
assert counted.input_tokens > client.messages.count_tokens(**asked).input_tokens


async def ask() -> str:
    async with anthropic.AsyncAnthropic(base_url=url, auth_token="none") as other:
        events = await other.messages.create(**asked, max_tokens=8, stream=True)
        return [event.type async for event in events][-1]


assert asyncio.run(ask()) == "message_stop"


def refused(error: type[anthropic.APIStatusError], **fields: object) -> anthropic.APIStatusError:
    try:
        client.messages.create(**{**asked, "max_tokens": 8, **fields})
    except error as err:
        return err
    raise AssertionError(f"{sorted(fields)} was not refused")


long = [{"role": "user", "content": "word " * 9000}]
for fields, error, kind in (
    ({"model": "claude-x"}, anthropic.NotFoundError, "not_found_error"),
    ({"extra_body": {"temperature": -1}}, anthropic.BadRequestError, "invalid_request_error"),
    ({"messages": long}, anthropic.BadRequestError, "invalid_request_error"),
):
    for given in (fields, {**fields, "stream": True}):
        reported = refused(error, **given)
        assert reported.type == kind
        assert reported.request_id
