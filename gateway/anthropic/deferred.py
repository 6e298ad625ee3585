"""Tools with ``defer_loading``, which the model sees and calls once it has looked for them.

Clients have a tool that finds tools; its result has references in place of text. Such a tool is
shown at that place of the conversation, not among the others at its beginning: the prompt before it
stays the same, and cached.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from cluster.core.errors import RequestError
from gateway.anthropic.schema import Block, CountTokensBody, ToolParam
from gateway.core.field_checks import require

REFERENCE = "tool_reference"
MAX_REFERRED_CHARS = 8 * 1024 * 1024
"""Characters of the tools that all references of a request name, each as often as it is named."""


def check_references(body: CountTokensBody) -> None:
    """Raise ``RequestError`` for references whose tools make too long a text together.

    Many references may name one tool.
    """
    tools = {tool.name: tool for tool in body.tools or ()}
    counts = Counter(block.tool_name for block in _references(body))
    named = [(tools[name], count) for name, count in counts.items() if name in tools]
    num_chars = sum(len(_written(tool)) * count for tool, count in named)
    rule = f"refer to tools of {num_chars} characters, at most {MAX_REFERRED_CHARS} are allowed"
    require(num_chars <= MAX_REFERRED_CHARS, "messages", rule)


def offered_tools(body: CountTokensBody) -> list[tuple[int, ToolParam]]:
    """The tools that may be called, with their places in ``tools``."""
    named = {block.tool_name for block in _references(body)}
    tools = enumerate(body.tools or ())
    return [(i, tool) for i, tool in tools if not tool.defer_loading or tool.name in named]


def _references(body: CountTokensBody) -> Iterator[Block]:
    for message in body.messages:
        for block in message.content:
            yield from (one for one in block.content or () if one.type == REFERENCE)


def shown_references(
    blocks: Sequence[Block], paths: Sequence[str], tools: Mapping[str, ToolParam]
) -> str:
    """What the model reads in place of references that follow each other.

    Args:
        blocks: the references.
        paths: of the blocks.
        tools: of the body, by name.

    Raises:
        RequestError: names the field.
    """
    lines = [_shown(block, path, tools) for block, path in zip(blocks, paths, strict=True)]
    return "\n".join(["<functions>", *lines, "</functions>"])


def _shown(block: Block, path: str, tools: Mapping[str, ToolParam]) -> str:
    name = f"{path}.tool_name"
    if block.tool_name is None:
        raise RequestError(f"{name} is required", name, "missing_required_parameter")
    tool = tools.get(block.tool_name)
    require(tool is not None, name, f"({block.tool_name[:64]!r}) is not among tools")
    assert tool is not None, "required"
    return _written(tool)


def _written(tool: ToolParam) -> str:
    known = {
        "description": tool.description or "",
        "name": tool.name,
        "parameters": tool.input_schema or {},
    }
    return f"<function>{json.dumps(known, ensure_ascii=False)}</function>"
