"""openai-python: every endpoint that it has and we serve."""

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
tools = [{"type": "function", "function": {"name": "look_up", "parameters": parameters}}]

assert [one.id for one in client.models.list()] == [model]
assert client.models.retrieve(model).id == model

whole = client.completions.create(model=model, prompt="ROMEO:", max_tokens=8, temperature=0)
assert whole.usage.completion_tokens == 8
chunks = client.completions.create(
    model=model, prompt="ROMEO:", max_tokens=8, temperature=0, stream=True
)
assert "".join(chunk.choices[0].text for chunk in chunks)

*parts, last = client.chat.completions.create(
    model=model,
    messages=messages,
    max_tokens=8,
    stream=True,
    stream_options={"include_usage": True},
)
assert parts[-1].choices[0].finish_reason in ("stop", "length")
assert last.choices == []
assert last.usage.prompt_tokens_details.cached_tokens >= 0

for choice in ("required", {"type": "function", "function": {"name": "look_up"}}):
    asked = {"model": model, "messages": messages, "tools": tools, "tool_choice": choice}
    answer = client.chat.completions.create(**asked, parallel_tool_calls=False).choices[0]
    assert answer.finish_reason == "tool_calls"
    (call,) = answer.message.tool_calls
    assert json.loads(call.function.arguments)["word"] in ("king", "queen")
with client.chat.completions.stream(
    model=model, messages=messages, tools=tools, tool_choice="required", parallel_tool_calls=False
) as stream:
    (call,) = stream.get_final_completion().choices[0].message.tool_calls
assert call.function.name == "look_up"
answered = [
    *messages,
    {"role": "assistant", "tool_calls": [call.model_dump(exclude={"index", "parsed_arguments"})]},
    {"role": "tool", "tool_call_id": call.id, "content": "a ruler"},
]
client.chat.completions.create(model=model, messages=answered, tools=tools, max_tokens=4)

schema = {"name": "pick", "schema": parameters, "strict": True}
formatted = client.chat.completions.create(
    model=model, messages=messages, response_format={"type": "json_schema", "json_schema": schema}
)
assert json.loads(formatted.choices[0].message.content)["word"] in ("king", "queen")

vectors = client.embeddings.create(model=model, input=["a", "b"]).data  # asks for base64
assert len(vectors) == 2
assert all(isinstance(value, float) for value in vectors[0].embedding)

for fields, error in (
    ({"model": "other"}, openai.NotFoundError),
    ({"temperature": -1}, openai.BadRequestError),
    ({"max_tokens": 10**6}, openai.BadRequestError),
):
    try:
        client.completions.create(**{"model": model, "prompt": "x", **fields})
    except error as caught:
        details = (caught.request_id, caught.code)
        if not all(details):
            raise AssertionError(f"{fields}: {details}") from caught
    else:
        raise AssertionError(f"{fields} was not refused")
