"""litellm: what it sends, and that it knows our errors for what they are."""

from __future__ import annotations

import os
import sys

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch one
import litellm

url, model = sys.argv[1:]
settings = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none"}
messages = [{"role": "user", "content": "Who is there?"}]
function = {
    "name": "look_up",
    "parameters": {"type": "object", "properties": {"word": {"enum": ["king", "queen"]}}},
}

answer = litellm.completion(**settings, messages=messages, max_tokens=8, drop_params=True)
assert answer.usage.completion_tokens <= 8
parts = litellm.completion(
    **settings, messages=messages, max_tokens=8, stream=True, stream_options={"include_usage": True}
)
assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
called = litellm.completion(
    **settings,
    messages=messages,
    tools=[{"type": "function", "function": function}],
    tool_choice="required",
    parallel_tool_calls=False,
    max_tokens=300,
)
assert called.choices[0].message.tool_calls[0].function.name == "look_up"
text = litellm.text_completion(
    **{**settings, "model": f"text-completion-openai/{model}"}, prompt="ROMEO:", max_tokens=8
)
assert text.choices[0].text
assert len(litellm.embedding(**settings, input=["a"]).data) == 1

long = [{"role": "user", "content": "word " * 9000}]
for fields, error in (
    ({"messages": long}, litellm.ContextWindowExceededError),
    ({"temperature": -1}, litellm.BadRequestError),
    ({"model": "openai/other"}, litellm.NotFoundError),
):
    try:
        litellm.completion(**{**settings, "messages": messages, "num_retries": 0, **fields})
    except error:
        pass
    else:
        raise AssertionError(f"{sorted(fields)} was not refused")
