"""anthropic-python and openai-python (Responses) at a server that is full at first."""

from __future__ import annotations

import sys

import anthropic
import openai

url, model, client = sys.argv[1:]
RETRIES = 50
messages = [{"role": "user", "content": "hi"}]
if client == "anthropic":
    of_messages = anthropic.Anthropic(base_url=url, api_key="none", max_retries=RETRIES)
    with of_messages.messages.stream(model=model, max_tokens=8, messages=messages) as stream:
        print(stream.get_final_text())
else:
    of_responses = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=RETRIES)
    answer = of_responses.responses.create(model=model, input="hi", max_output_tokens=8)
    print(answer.output_text)
