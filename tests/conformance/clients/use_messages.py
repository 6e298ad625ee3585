"""langchain-anthropic, and litellm as a client of Anthropic's Messages."""

from __future__ import annotations

import os
import sys
from typing import Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would fetch one
import litellm
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage, SystemMessage
from pydantic import BaseModel

url, model = sys.argv[1:]


class LookUp(BaseModel):
    """Looks a word up."""

    word: Literal["king", "queen"]


# ---- langchain-anthropic --------------------------------------------------------------------

chat = ChatAnthropic(model=model, base_url=url, api_key="none", max_tokens=300, max_retries=0)
messages = [SystemMessage("Be brief."), HumanMessage([{"type": "text", "text": "Who is there?"}])]
answer = chat.bind(max_tokens=8).invoke(messages)
assert answer.usage_metadata["output_tokens"] <= 8
parts = list(chat.bind(max_tokens=8).stream(messages))
assert "".join(part.text for part in parts)
assert any(part.usage_metadata for part in parts)
bound = chat.bind_tools([LookUp], tool_choice="any", parallel_tool_calls=False)
(call,) = bound.invoke(messages).tool_calls
assert (call["name"], call["args"]["word"] in ("king", "queen")) == ("LookUp", True)
total = None
for part in bound.stream(messages):
    total = part if total is None else total + part
assert total.tool_calls[0]["args"]["word"] in ("king", "queen")

# ---- litellm --------------------------------------------------------------------------------

settings = {"model": f"anthropic/{model}", "api_base": url, "api_key": "none", "num_retries": 0}
asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is there?"}]
function = {
    "name": "look_up",
    "parameters": {"type": "object", "properties": {"word": {"enum": ["king", "queen"]}}},
}
said = litellm.completion(**settings, messages=asked, max_tokens=8)
assert said.usage.completion_tokens <= 8
parts = litellm.completion(**settings, messages=asked, max_tokens=8, stream=True)
assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
called = litellm.completion(
    **settings,
    messages=asked,
    tools=[{"type": "function", "function": function}],
    tool_choice="required",
    parallel_tool_calls=False,
    max_tokens=300,
)
assert called.choices[0].message.tool_calls[0].function.name == "look_up"
long = [{"role": "user", "content": "word " * 9000}]
for fields, error in (
    ({"messages": long}, litellm.ContextWindowExceededError),
    ({"temperature": -1}, litellm.BadRequestError),
    ({"model": "anthropic/other"}, litellm.NotFoundError),
):
    try:
        litellm.completion(**{**settings, "messages": asked, "max_tokens": 8, **fields})
    except error:
        pass
    else:
        raise AssertionError(f"{sorted(fields)} was not refused")
