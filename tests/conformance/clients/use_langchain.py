"""langchain-openai: chat, streams, tools, structured answers, embeddings."""

from __future__ import annotations

import sys
from typing import Literal

from langchain_core.messages import HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

url, model = sys.argv[1:]
settings = {"base_url": f"{url}/v1", "api_key": "none", "max_retries": 0}


class LookUp(BaseModel):
    """Looks a word up."""

    word: Literal["king", "queen"]


chat = ChatOpenAI(model=model, max_tokens=300, **settings)
messages = [SystemMessage("Be brief."), HumanMessage([{"type": "text", "text": "Who is there?"}])]
answer = chat.invoke(messages, max_tokens=8)
assert answer.usage_metadata["output_tokens"] <= 8
parts = list(chat.bind(max_tokens=8).stream(messages, stream_usage=True))
assert "".join(part.text for part in parts)
assert any(part.usage_metadata for part in parts)

bound = chat.bind_tools([LookUp], tool_choice="LookUp", parallel_tool_calls=False)
(call,) = bound.invoke(messages).tool_calls
assert call["name"] == "LookUp"
assert call["args"]["word"] in ("king", "queen")
total = None
for part in bound.stream(messages):
    total = part if total is None else total + part
assert total.tool_calls[0]["args"]["word"] in ("king", "queen")

for method in ("json_schema", "function_calling"):
    structured = chat.with_structured_output(LookUp, method=method)
    assert structured.invoke(messages).word in ("king", "queen")

assert OpenAI(model=model, max_tokens=8, **settings).invoke("ROMEO:")
embeddings = OpenAIEmbeddings(model=model, check_embedding_ctx_length=False, **settings)
assert len(embeddings.embed_documents(["a", "b"])) == 2
