"""Chat templates, which render a conversation to a prompt in a sandbox.

A template is Jinja, as transformers defines it, and part of the checkpoint. Its variables are the
messages, the special tokens and the client's ``chat_template_kwargs``.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from cluster.core.errors import CheckpointError, RequestError
from gateway.core.messages import with_reasoning
from gateway.core.thinking import END
from gateway.core.tool_use import Tool, ToolCallFormat
from gateway.text.instructions import (
    SYSTEM,
    USER,
    contains_instructions,
    instructions_to_user,
    late_instructions_to_user,
    late_roles,
    leading_roles,
    merge_all_instructions,
    merge_leading_instructions,
)
from gateway.text.template_limits import BoundedEnvironment, render
from gateway.text.tool_formats.call_ids import fit_call_ids

_RENDER_ERRORS = (
    jinja2.TemplateError,
    AssertionError,  # of Jinja's filters, which check arguments with it
    AttributeError,
    NameError,  # in code that Jinja generates for a constant such as 1e999
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    RecursionError,
)
_PROBE = "expertmesh-probe"
_PROBE_TOOL = Tool(
    name="f",
    description="f",
    parameters={"type": "object", "properties": {"x": {"type": "string"}}, "required": ["x"]},
).for_template()
"""Tool of probes. Results of probes are cached, so a client's tools must not affect them."""
_MARK = "expertmesh-end-of-final-message "
_USUAL_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_MAX_SHOWN_CHARS = 64
_MAX_LEADING_ROLES = 8
"""Maximum number of system and developer messages at the start with which a template is probed."""
_ASSISTANT = "assistant"


class _GenerationTag(Extension):
    """Ignores the tag ``{% generation %}``, which marks text of the assistant for training."""

    tags = {"generation"}  # noqa: RUF012  (the name and type are Jinja's)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: Jinja text.
        variables: special tokens by name, such as ``bos_token``.
        field: the request field that contains the template; None for the model's template.
        tool_use: source of a separate template for conversations with tools.

    Raises:
        CheckpointError: the text is not a template.
    """

    def __init__(
        self,
        source: str,
        variables: Mapping[str, str] | None = None,
        field: str | None = None,
        tool_use: str | None = None,
    ) -> None:
        environment = BoundedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.compile_bounded(source)
            names = meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as err:
            raise CheckpointError(f"the chat template is not valid: {err}") from err
        self._field = field
        self._source = source
        self._probe_results: dict[tuple[tuple[str, ...], bool], frozenset[int] | None] = {}
        self._tool_use = None if tool_use is None else ChatTemplate(tool_use, variables, field)
        self.variables = dict(variables or {})
        """Special tokens by name."""
        has_tools, other = "tools" in names, self._tool_use
        self.has_tools: bool = has_tools if other is None else other.has_tools
        self.tool_format: ToolCallFormat | None = (
            self._find_tool_format() if other is None else other.tool_format
        )
        """Format of the model's tool calls. None if the format is unknown, or if the template does
        not support tools; Harmony (gpt-oss) is found even without tools."""
        self.has_thinking: bool = END in source or (other is not None and other.has_thinking)
        """Whether the model may write reasoning before its answer."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Render a conversation to a prompt.

        System and developer messages are moved if the template does not accept them at their
        position: see ``gateway.text.instructions``.

        Raises:
            RequestError: the template rejects the conversation.
        """
        if tools is not None and self._tool_use is not None:
            return self._tool_use.render(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                variables=variables,
                tools=tools,
            )
        values = {**self.variables, **(variables or {}), "documents": None, "tools": tools}
        values["add_generation_prompt"] = add_generation_prompt
        if continue_final_message:
            messages = [*messages[:-1], _with_mark(messages[-1])]
        text, rendered = self._render(messages, values, tools)
        for message in rendered:
            role = str(message.get("role"))
            if not self._supports_role(role, tools):
                indices = (i for i, m in enumerate(messages) if str(m.get("role")) == role)
                index = next(indices, None)  # None for the role of a message that was moved
                place = "" if index is None else f" (messages[{index}])"
                raise self._template_error(f"it has no role {role[:_MAX_SHOWN_CHARS]!r}{place}")
        return _cut_at_mark(text, messages[-1]) if continue_final_message else text

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        values: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> tuple[str, Sequence[Mapping[str, Any]]]:
        """Render the conversation and return the prompt with the messages that it contains.

        If the template rejects the conversation, other positions of the instructions (system and
        developer messages) are tried. The result is the first prompt that contains all
        instructions, else the first prompt.
        """
        first_result: tuple[str, Sequence[Mapping[str, Any]]] | None = None
        refusal: Exception | None = None
        tried: list[Sequence[Mapping[str, Any]]] = []
        for placed in self._instruction_variants(messages, tools):
            if placed in tried:
                continue
            tried.append(placed)
            try:
                text = self._render_text(values, fit_call_ids(placed, self.tool_format))
            except _RENDER_ERRORS as err:
                refusal = refusal or err
                continue
            if refusal is None or contains_instructions(text, messages):
                return text, placed
            first_result = first_result or (text, placed)
        if first_result is None:
            assert refusal is not None, "there was neither a prompt nor an error"
            raise self._template_error(refusal) from refusal
        return first_result

    def _instruction_variants(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> Iterator[Sequence[Mapping[str, Any]]]:
        """Yield the conversation with its instructions at different positions, best first."""
        yield self._move_instructions(messages, tools)
        yield late_instructions_to_user(merge_leading_instructions(messages))
        together = merge_all_instructions(messages)
        yield self._move_instructions(together, tools)
        yield instructions_to_user(together)

    def _render_text(self, values: Mapping[str, Any], messages: Sequence[Mapping[str, Any]]) -> str:
        messages_shown = [with_reasoning(message) for message in messages]
        return render(self._template, {**values, "messages": messages_shown})

    def _move_instructions(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> Sequence[Mapping[str, Any]]:
        """Move system and developer messages to positions at which the template includes them."""
        leading = leading_roles(messages)[:_MAX_LEADING_ROLES]
        if leading and leading != (SYSTEM,) and not self._includes_all((*leading, USER), tools):
            messages, leading = merge_leading_instructions(messages), (SYSTEM,)
        late = late_roles(messages)
        probes = ((*leading, USER, *(_ASSISTANT, role, USER) * 2) for role in late)
        if not all(self._includes_all(roles, tools) for roles in probes):
            messages = late_instructions_to_user(messages)
        probe = (SYSTEM,) if len(leading) == len(messages) else (SYSTEM, USER)
        is_shown = self._includes_all(probe, tools) or not self._includes_all((USER,), tools)
        return messages if is_shown or not leading else instructions_to_user(messages)

    def _find_tool_format(self) -> ToolCallFormat | None:
        """Return the model's tool call format, or None. Harmony is found even without tools."""
        formats = (form for form in ToolCallFormat if form.is_shown_by(self._source))
        return next((f for f in formats if self.has_tools or f is ToolCallFormat.HARMONY), None)

    def _supports_role(self, role: str, tools: Sequence[Mapping[str, Any]] | None) -> bool:
        """Whether the template supports a role.

        The template must name roles other than the usual ones. Since many templates skip messages
        with unknown roles, the text of a probe message with the role must be in the prompt, unless
        the template includes no messages at all.
        """
        if role not in _USUAL_ROLES and f"'{role}'" not in self._source.replace('"', "'"):
            return False
        included = [
            (index, self._included_roles(roles, tools))
            for index, roles in enumerate(((role, USER), (USER, role), (USER, _ASSISTANT, role)))
        ]
        appears = [index in shown for index, shown in included if shown is not None]
        return any(appears) or not appears or not self._includes_all((USER,), tools)

    def _includes_all(
        self, roles: tuple[str, ...], tools: Sequence[Mapping[str, Any]] | None
    ) -> bool:
        """Whether the template accepts messages with these roles and renders all their texts."""
        included = self._included_roles(roles, tools)
        return included is not None and len(included) == len(roles)

    def _included_roles(
        self, roles: tuple[str, ...], tools: Sequence[Mapping[str, Any]] | None
    ) -> frozenset[int] | None:
        """Return the indices of roles whose messages are in the prompt; None if rendering fails."""
        key = (roles, bool(tools))
        if key not in self._probe_results:
            self._probe_results[key] = self._probe(roles, [_PROBE_TOOL] if tools else None)
        return self._probe_results[key]

    def _probe(
        self, roles: tuple[str, ...], tools: Sequence[Mapping[str, Any]] | None
    ) -> frozenset[int] | None:
        texts = [f"{_PROBE}-{index}-" for index in range(len(roles))]
        messages = [
            {"role": role, "content": text, "name": "x", "tool_call_id": "x"}
            for role, text in zip(roles, texts, strict=True)
        ]
        try:
            values = {**self.variables, "tools": tools, "documents": None}
            prompt = self._render_text(values, messages)
        except _RENDER_ERRORS:
            return None
        return frozenset(index for index, text in enumerate(texts) if text in prompt)

    def _template_error(self, reason: Exception | str) -> RequestError:
        if self._field is not None:
            return RequestError(f"{self._field} does not fit the messages: {reason}", self._field)
        message = f"messages do not fit the model's chat template: {reason}"
        return RequestError(message, "messages")


def _with_mark(message: Mapping[str, Any]) -> dict[str, Any]:
    """Append a mark to the text of a message, so that its end can be found in the prompt."""
    content = message.get("content")
    if not isinstance(content, str) or not content:
        raise _cannot_continue()
    return {**message, "content": f"{content}{_MARK}"}


def _cut_at_mark(text: str, marked: Mapping[str, Any]) -> str:
    """Cut the prompt at the end of the last message's text, which the model continues.

    The mark ends with a space: if the template removes this space, it would also have removed white
    space at the end of the text. Source: ``continue_final_message`` of transformers, which also
    removes white space of the template if the text is only white space.
    """
    content = marked["content"].removesuffix(_MARK)
    position = text.rfind(_MARK.rstrip())
    if position < 0 or content.strip() not in text[:position]:
        raise _cannot_continue()
    if text.startswith(_MARK, position):
        return text[:position]
    num_spaces = len(content) - len(content.rstrip()) if content.strip() else 0  # stripped, too
    return text[: position - num_spaces]


def _cannot_continue() -> RequestError:
    return RequestError(
        "continue_final_message needs a final message with content that the chat template keeps as "
        "it is",
        "continue_final_message",
    )


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
