"""Answers and prompts in the Harmony format, from its documentation.

Source: "Harmony response format" (OpenAI, 2025), docs/format.md of
https://github.com/openai/harmony.
"""

from __future__ import annotations

from gateway.core.tool_use import Tool

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

_ABOUT = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\nCurrent date: 2025-06-28\n\nReasoning: high\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
)
SYSTEM = f"{_ABOUT}<|end|>"
SYSTEM_WITH_TOOLS = (
    f"{_ABOUT}\nCalls to these tools must go to the commentary channel: 'functions'.<|end|>"
)
FUNCTIONS = """\
# Tools

## functions

namespace functions {

// Gets the location of the user.
type get_location = () => any;

// Gets the current weather in the provided location.
type get_current_weather = (_: {
// The city and state, e.g. San Francisco, CA
location: string,
format?: "celsius" | "fahrenheit", // default: celsius
}) => any;

// Gets the current weather in the provided list of locations.
type get_multiple_weathers = (_: {
// List of city and state, e.g. ["San Francisco, CA", "New York, NY"]
locations: string[],
format?: "celsius" | "fahrenheit", // default: celsius
}) => any;

} // namespace functions"""
DECLARED = (
    f"<|start|>developer<|message|># Instructions\n\nUse a friendly tone.\n\n{FUNCTIONS}<|end|>"
)
CONVERSATION = (
    f"{SYSTEM_WITH_TOOLS}{DECLARED}"
    "<|start|>user<|message|>What is the weather like in SF?<|end|>"
    f"<|start|>assistant{WEATHER}"
    "<|start|>functions.get_weather to=assistant<|channel|>commentary<|message|>"
    '{"sunny": true, "temperature": 20}<|end|><|start|>assistant'
)

_FORMAT = {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"}
_LOCATION = {"type": "string", "description": "The city and state, e.g. San Francisco, CA"}
_LOCATIONS = {
    "type": "array",
    "items": {"type": "string"},
    "description": 'List of city and state, e.g. ["San Francisco, CA", "New York, NY"]',
}
WEATHER_TOOLS = [
    tool.for_template()
    for tool in (
        Tool(name="get_location", description="Gets the location of the user."),
        Tool(
            name="get_current_weather",
            description="Gets the current weather in the provided location.",
            parameters={
                "type": "object",
                "properties": {"location": _LOCATION, "format": _FORMAT},
                "required": ["location"],
            },
        ),
        Tool(
            name="get_multiple_weathers",
            description="Gets the current weather in the provided list of locations.",
            parameters={
                "type": "object",
                "properties": {"locations": _LOCATIONS, "format": _FORMAT},
                "required": ["locations"],
            },
        ),
    )
]
"""As the format's library has them in the test of this example, tests/test_harmony.py."""
