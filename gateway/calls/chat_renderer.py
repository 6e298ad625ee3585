"""Renders conversations with the model's or the client's chat template."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cluster.core.errors import RequestError, UnsupportedParameterError
from gateway.core.call import ChatInput
from gateway.core.field_checks import check_chat
from gateway.core.tool_use import ToolCallFormat
from gateway.text.chat_template import ChatTemplate
from gateway.text.client_templates import ClientTemplateRenderer, RenderedTemplate
from gateway.text.harmony.template import HarmonyTemplate
from gateway.text.render_template import PARAM
from gateway.text.tokenizer import Tokenizer, require_tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedChat:
    """The rendered prompt of a conversation, and the expected format of the model's output."""

    text: str
    form: ToolCallFormat
    """Format of tool calls in the output."""
    has_thinking: bool
    """Whether the output may contain reasoning between delimiters, such as ``<think>``."""


class ChatRenderer:
    """Renders conversations to prompts, with the chat template and variables of each request.

    Args:
        tokenizer: the tokenizer with the model's template; None if the checkpoint has none.
        trusts_templates: whether to render chat templates that clients send.
    """

    def __init__(self, tokenizer: Tokenizer | None, trusts_templates: bool) -> None:
        self._tokenizer = tokenizer
        self._trusts_templates = trusts_templates
        self._client_templates = ClientTemplateRenderer()

    async def render(self, chat: ChatInput) -> RenderedChat:
        """Render a conversation to a prompt. Raises ``RequestError`` without a chat template."""
        check_chat(chat)
        opens_turn = chat.add_generation_prompt
        options: dict[str, Any] = {
            "add_generation_prompt": not chat.continue_final_message
            if opens_turn is None
            else opens_turn,
            "continue_final_message": bool(chat.continue_final_message),
            "tools": None if chat.tools is None else chat.tools.for_template(),
        }
        own = require_tokenizer(self._tokenizer, "messages").chat_template
        if chat.template is not None:
            variables = {} if own is None else own.variables
            options["variables"] = _variables(chat, chat.reasoning_effort)
            return await self._render_foreign(chat, chat.template, variables, options)
        if own is None:
            raise RequestError("the model has no chat template: use completions", "messages")
        form, effort = _check_tools(chat, own), chat.reasoning_effort
        if isinstance(own, HarmonyTemplate):
            options["output_schema"] = chat.output_schema
            effort = effort if own.knows_effort(effort) else None
        options["variables"] = _variables(chat, effort)
        text = await asyncio.to_thread(own.render, chat.messages, **options)
        return RenderedChat(text=text, form=form, has_thinking=own.has_thinking)

    async def _render_foreign(
        self,
        chat: ChatInput,
        source: str,
        variables: Mapping[str, str],
        options: Mapping[str, Any],
    ) -> RenderedChat:
        if not self._trusts_templates:
            needs = "the server was started without --trust-request-chat-template"
            raise UnsupportedParameterError(f"chat_template is not supported: {needs}", PARAM)
        found = await self._client_templates.render(source, variables, chat.messages, options)
        form = _check_tools(chat, found)
        if found.error is not None:
            raise found.error
        return RenderedChat(text=found.text or "", form=form, has_thinking=found.has_thinking)


def _variables(chat: ChatInput, effort: str | None) -> Mapping[str, Any]:
    """Return the variables for a conversation's template, with ``reasoning_effort`` if it is set.

    A value in the client's ``template_kwargs`` has precedence.
    """
    given = chat.template_kwargs
    if effort is None or given.get("reasoning_effort") is not None:
        return given
    return {**given, "reasoning_effort": effort}


def _check_tools(
    chat: ChatInput, template: ChatTemplate | HarmonyTemplate | RenderedTemplate
) -> ToolCallFormat:
    """Return the format of tool calls in the model's output; a default if the format is unknown.

    Raises:
        UnsupportedParameterError: the conversation has tools that the template does not support.
    """
    form = template.tool_format
    if chat.tools is not None and (form is None or not template.has_tools):
        takes = "tools in an unknown format" if template.has_tools else "no tools"
        reason = f"tools is not supported: the model's chat template takes {takes}"
        raise UnsupportedParameterError(reason, "tools")
    for place, message in enumerate(chat.messages):
        if not template.has_tools and message.get("tool_calls"):
            name = f"messages[{place}].tool_calls"
            reason = f"{name} is not supported: the model's chat template takes no tools"
            raise UnsupportedParameterError(reason, name)
    return form or ToolCallFormat.HERMES
