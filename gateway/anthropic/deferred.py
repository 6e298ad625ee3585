"""Tools with ``defer_loading``, which the model sees only after a search for tools.

A client offers a tool that searches for tools; its result contains references to tools. The
gateway replaces each reference by the tool's declaration. The prompt before the reference does
not change and remains cached.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from cluster.core.errors import RequestError
from gateway.anthropic.schema import ContentBlockParam, CountTokensBody, ToolParam
from gateway.core.field_checks import require

REFERENCE = "tool_reference"
MAX_REFERENCED_CHARS = 8 * 1024 * 1024
"""Maximum total length of the referenced declarations; repeated references count each time."""


def check_references(body: CountTokensBody) -> None:
    """Raise ``RequestError`` if the referenced declarations exceed ``MAX_REFERENCED_CHARS``."""
    tools = {tool.name: tool for tool in body.tools or ()}
    counts = Counter(block.tool_name for block in _references(body))
    named = [(tools[name], count) for name, count in counts.items() if name in tools]
    num_chars = sum(len(_declaration(tool)) * count for tool, count in named)
    rule = f"refer to tools of {num_chars} characters, at most {MAX_REFERENCED_CHARS} are allowed"
    require(num_chars <= MAX_REFERENCED_CHARS, "messages", rule)


def callable_tools(body: CountTokensBody) -> list[tuple[int, ToolParam]]:
    """Return (index in ``tools``, tool) of all tools that are not deferred or are referenced."""
    named = {block.tool_name for block in _references(body)}
    tools = enumerate(body.tools or ())
    return [(i, tool) for i, tool in tools if not tool.defer_loading or tool.name in named]


def _references(body: CountTokensBody) -> Iterator[ContentBlockParam]:
    for message in body.messages:
        for block in message.content:
            yield from (one for one in block.content or () if one.type == REFERENCE)


def render_references(
    blocks: Sequence[ContentBlockParam], paths: Sequence[str], tools: Mapping[str, ToolParam]
) -> str:
    """Return the text that replaces consecutive references.

    Args:
        blocks: the references.
        paths: name of each block's field, for errors.
        tools: the tools of the body by name.

    Raises:
        RequestError: a reference is invalid; the error names the field.
    """
    lines = [
        _render_reference(block, path, tools) for block, path in zip(blocks, paths, strict=True)
    ]
    return "\n".join(["<functions>", *lines, "</functions>"])


def _render_reference(block: ContentBlockParam, path: str, tools: Mapping[str, ToolParam]) -> str:
    name = f"{path}.tool_name"
    if block.tool_name is None:
        raise RequestError.missing(name)
    tool = tools.get(block.tool_name)
    require(tool is not None, name, f"({block.tool_name[:64]!r}) is not among tools")
    assert tool is not None, "required"
    return _declaration(tool)


def _declaration(tool: ToolParam) -> str:
    declaration = {
        "description": tool.description or "",
        "name": tool.name,
        "parameters": tool.input_schema or {},
    }
    return f"<function>{json.dumps(declaration, ensure_ascii=False)}</function>"
