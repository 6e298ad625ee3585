"""openai-python over Responses: text, streams, tools, structured text, stored conversations.

Also what Codex does with it: the whole conversation each time, tools of all kinds, a cache key.
"""

from __future__ import annotations

import json
import sys

import openai

url, model = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120)
messages = [{"role": "user", "content": "Who is there?"}]
parameters = {
    "type": "object",
    "properties": {"word": {"enum": ["king", "queen"]}},
    "required": ["word"],
    "additionalProperties": False,
}
look_up = {"type": "function", "name": "look_up", "parameters": parameters, "strict": True}
short = {"model": model, "max_output_tokens": 8, "temperature": 0}
calling = {"model": model, "tools": [look_up], "parallel_tool_calls": False}

whole = client.responses.create(**short, input="ROMEO:", instructions="Be brief.", store=False)
assert whole.usage.output_tokens <= 8
assert whole.output_text
assert whole.status in ("completed", "incomplete")
with client.responses.stream(
    **short,
    input=messages,
    store=False,
    include=["message.output_text.logprobs", "reasoning.encrypted_content"],
    top_logprobs=1,
    reasoning={"effort": "low", "summary": "auto"},
) as stream:
    events = list(stream)
kinds = [event.type for event in events]
assert kinds[:2] == ["response.created", "response.in_progress"]
assert kinds[-1] in ("response.completed", "response.incomplete")
assert events[-1].response.output[0].content[0].logprobs

for choice in ("required", {"type": "function", "name": "look_up"}):
    first = client.responses.create(**calling, input=messages, tool_choice=choice, store=False)
    (call,) = first.output
    assert json.loads(call.arguments)["word"] in ("king", "queen")
with client.responses.stream(**calling, input=messages, tool_choice="required") as stream:
    (call,) = stream.get_final_response().output
assert call.parsed_arguments["word"] in ("king", "queen")
answered = [
    *messages,
    call.model_dump(exclude={"parsed_arguments"}, exclude_none=True),
    {"type": "function_call_output", "call_id": call.call_id, "output": "a ruler"},
]
client.responses.create(**short, input=answered, tools=[look_up], store=False)

# ---- as Codex does it: nothing is stored, and all items come back -------------------------------

patch = {"type": "custom", "name": "patch", "description": "Takes a patch."}
read = {"type": "function", "name": "read", "parameters": parameters}
files = {"type": "namespace", "name": "mcp__files", "description": "Files.", "tools": [read]}
agent = {
    "model": model,
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "a-thread",
    "extra_headers": {"session-id": "a-thread"},
}
thought = {
    "type": "reasoning",
    "id": "rs_1",
    "summary": [{"type": "summary_text", "text": "A man is there."}],
    "content": [{"type": "reasoning_text", "text": "A man."}],
}
history = [{"role": "developer", "content": "Be brief."}, *messages, thought]
wanted = {"tools": [files], "tool_choice": "required", "parallel_tool_calls": False}
with client.responses.stream(**agent, **wanted, input=history) as stream:
    (asked,) = stream.get_final_response().output
assert (asked.name, asked.namespace) == ("read", "mcp__files")
assert json.loads(asked.arguments)["word"] in ("king", "queen")
history += [
    asked.model_dump(exclude={"parsed_arguments"}, exclude_none=True),
    {"type": "function_call_output", "call_id": asked.call_id, "output": "a ruler"},
    {"type": "custom_tool_call", "call_id": "c2", "name": "patch", "input": "*** Begin"},
    {"type": "custom_tool_call_output", "call_id": "c2", "output": "done"},
]
several = client.responses.create(
    **agent, input=history, tools=[files, look_up, patch], tool_choice="auto", max_output_tokens=8
)
assert several.usage.output_tokens <= 8
both = client.responses.create(**agent, input=history, tools=[look_up], tool_choice="required")
assert {item.name for item in both.output} == {"look_up"}
assert len({item.call_id for item in both.output}) == len(both.output)
named = {"type": "custom", "name": "patch"}
written = client.responses.create(
    **agent, input=history, tools=[patch], tool_choice=named, max_output_tokens=40
)
assert written.output[0].type == "custom_tool_call"

formatted = client.responses.create(
    model=model,
    input=messages,
    text={"format": {"type": "json_schema", "name": "pick", "schema": parameters}},
    store=False,
)
assert json.loads(formatted.output_text)["word"] in ("king", "queen")

one = client.responses.create(**short, input="ROMEO:", metadata={"part": "1"})
two = client.responses.create(**short, input="Go on.", previous_response_id=one.id)
assert two.usage.input_tokens > one.usage.input_tokens
assert client.responses.retrieve(two.id).output_text == two.output_text
listed = client.responses.input_items.list(two.id, order="asc", limit=1)
assert [item.role for item in listed] == ["user", "assistant", "user"]
client.responses.delete(one.id)

for fields, error in (
    ({"model": "other"}, openai.NotFoundError),
    ({"temperature": -1}, openai.BadRequestError),
    ({"tools": [{"type": "web_search"}]}, openai.BadRequestError),
    ({"previous_response_id": one.id}, openai.BadRequestError),
):
    try:
        client.responses.create(**{"model": model, "input": "x", **fields})
    except error as caught:
        details = (caught.request_id, caught.code, caught.param)
        if not all(details):
            raise AssertionError(f"{fields}: {details}") from caught
    else:
        raise AssertionError(f"{fields} was not refused")
