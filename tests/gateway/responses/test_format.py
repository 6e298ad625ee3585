"""Items from pieces of text and their tokens."""

from __future__ import annotations

from itertools import accumulate
from typing import Any, cast

from gateway.core.call import CallKind, ChatInput, GenerateCall
from gateway.core.delta import ChoiceDelta, TokenText
from gateway.core.tool_use import Tool, ToolCallFormat, ToolUse
from gateway.responses.format import OutputFormat
from gateway.responses.items import ItemIdGenerator
from gateway.responses.output import OutputBuilder


class _Token:
    """A token that counts how often its offset is read."""

    logprob = None
    num_reads = 0

    def __init__(self, offset: int) -> None:
        self._offset = offset

    @property
    def text_offset(self) -> int:
        _Token.num_reads += 1
        return self._offset


def test_tokens_of_a_long_value_are_not_read_again_for_each_token() -> None:
    """An optional text of 20,000 tokens would otherwise take the event loop five seconds."""
    schema: dict[str, Any] = {"properties": {"a": {"type": ["string", "null"]}}}
    use = ToolUse(tools=(Tool(name="f", parameters=schema, is_strict=False),))
    call = GenerateCall(
        kind=CallKind.CHAT,
        chat=ChatInput(messages=({"role": "user", "content": "x"},), tools=use),
        tool_format=ToolCallFormat.QWEN_CODER,
    )
    builder = OutputBuilder(ItemIdGenerator(f"resp_{'0' * 32}"), frozenset(), False)
    output = OutputFormat(call, None, builder)
    head = "<tool_call>\n<function=f>\n<parameter=a>\n"
    texts = [head, *["word "] * 500, "\n</parameter>\n</function>\n</tool_call>"]
    for text, offset in zip(texts, accumulate(map(len, ["", *texts])), strict=False):
        token = cast("TokenText", _Token(offset))
        piece = ChoiceDelta(index=0, prompt_index=0, is_first=False, text=text, tokens=(token,))
        output.feed([piece])
    (item,) = builder.output()
    assert item["arguments"] == f'{{"a": "{"word " * 500}"}}'
    assert _Token.num_reads < 10 * len(texts)
