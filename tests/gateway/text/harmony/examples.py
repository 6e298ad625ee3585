"""Answers in the Harmony format, from its documentation.

Source: "Harmony response format" (OpenAI, 2025), docs/format.md of
https://github.com/openai/harmony.
"""

from __future__ import annotations

SUM = (
    '<|channel|>analysis<|message|>User asks: "What is 2 + 2?" Simple arithmetic. Provide answer.'
    "<|end|><|start|>assistant<|channel|>final<|message|>2 + 2 = 4.<|return|>"
)
WEATHER_ARGUMENTS = '{"location":"San Francisco"}'
WEATHER = (
    "<|channel|>analysis<|message|>Need to use function get_weather.<|end|><|start|>assistant"
    "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
    f"{WEATHER_ARGUMENTS}<|call|>"
)
WORDS_BEFORE_CALL = (
    "**Action plan**:\n1. Generate an HTML file\n2. Generate a JavaScript for the Node.js server\n"
    "3. Start the server\n---\nWill start executing the plan step by step"
)
PLAN_ARGUMENTS = '{"template": "basic_html", "path": "index.html"}'
PLAN = (
    "<|channel|>analysis<|message|>{long chain of thought}<|end|><|start|>assistant<|channel|>"
    f"commentary<|message|>{WORDS_BEFORE_CALL}<|end|><|start|>assistant<|channel|>commentary "
    f"to=functions.generate_file<|constrain|>json<|message|>{PLAN_ARGUMENTS}<|call|>"
)
