"""Prompts from text and conversations to tokens, off the event loop where they are long."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.core.errors import RequestError, UnsupportedParameterError
from gateway.core.call import ChatInput, GenerateCall
from gateway.core.field_checks import check_chat
from gateway.core.model import ModelFacts
from gateway.core.thinking import BEGIN, END, Thinking, thinking_after
from gateway.core.tool_use import ToolForm
from gateway.generation.validate import check_context, check_token_ids, kept_tokens
from gateway.offload.long_work import INLINE_SIZE, LongWork
from gateway.text.chat_template import ChatTemplate
from gateway.text.client_templates import ClientTemplates, TemplateAnswer
from gateway.text.encoding import (
    MAX_TOKENS,
    EncodedText,
    TextEncoder,
    check_num_tokens,
)
from gateway.text.forms.answer_grammar import answer_grammar
from gateway.text.harmony.grammar import harmony_grammar
from gateway.text.harmony.marks import ENDS, MESSAGE, START, open_header, open_message
from gateway.text.harmony.template import HarmonyTemplate
from gateway.text.render_template import PARAM
from gateway.text.tokenizer import Tokenizer

_LAST_TOKENS = 16
"""Tokens of a prompt that end with the mark of reasoning and white space, if it ends so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RenderedChat:
    """The prompt of a conversation, and what is known of its answer."""

    text: str
    form: ToolForm
    """How the answer's calls are written."""
    has_thinking: bool
    """The answer may have reasoning between marks of its own."""


class PromptMaker:
    """Tokenizes.

    Args:
        tokenizer: None where the checkpoint has none: prompts must be token ids then.
        trusts_templates: render chat templates that clients send.
        long_work: takes what is long, and holds the interpreter lock.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, trusts_templates: bool, long_work: LongWork
    ) -> None:
        self.tokenizer = tokenizer
        self._long_work = long_work
        self._text_encoder = None if tokenizer is None else TextEncoder(tokenizer, long_work)
        self._trusts_templates = trusts_templates
        self._client_templates = ClientTemplates()

    @property
    def has_tools(self) -> bool:
        """The model's chat template takes tools, in a form that is known."""
        template = self.tokenizer.chat_template if self.tokenizer else None
        return template is not None and template.has_tools and template.tool_form is not None

    @property
    def _encoder(self) -> TextEncoder:
        self.require_tokenizer("prompt")
        assert self._text_encoder is not None, "there is a tokenizer"
        return self._text_encoder

    async def stop(self) -> None:
        """End the process of long texts."""
        if self._text_encoder is not None:
            await self._text_encoder.stop()

    def require_tokenizer(self, param: str) -> Tokenizer:
        """The tokenizer. Raises ``RequestError`` without one."""
        if self.tokenizer is None:
            raise RequestError(
                "the model has no tokenizer: only token ids can be used, not text", param
            )
        return self.tokenizer

    async def count_tokens(self, chat: ChatInput) -> int:
        """Tokens of a conversation."""
        text = (await self.render(chat)).text
        (encoded,) = await self._encoder.encode([text], False, slice(0))
        return encoded.num_tokens

    async def tokenize(
        self, text: str, chat: ChatInput | None, add_special_tokens: bool | None
    ) -> tuple[int, ...]:
        """Token ids of a text or of a conversation.

        The tokenizer adds its own tokens to a text by default, to a conversation on demand.

        Raises:
            RequestError: there are more than ``MAX_TOKENS``.
        """
        special = add_special_tokens is not False
        if chat is not None:
            text, special = (await self.render(chat)).text, bool(add_special_tokens)
        (encoded,) = await self._encoder.encode([text], special, slice(MAX_TOKENS))
        check_num_tokens("prompt" if chat is None else "messages", encoded.num_tokens)
        return encoded.ids

    async def render(self, chat: ChatInput) -> RenderedChat:
        """The prompt of a conversation. Raises ``RequestError`` without a chat template."""
        check_chat(chat)
        opens_turn = chat.add_generation_prompt
        options: dict[str, Any] = {
            "add_generation_prompt": not chat.continue_final_message
            if opens_turn is None
            else opens_turn,
            "continue_final_message": bool(chat.continue_final_message),
            "tools": None if chat.tools is None else chat.tools.for_template(),
        }
        own = self.require_tokenizer("messages").chat_template
        if chat.template is not None:
            variables = {} if own is None else own.variables
            options["variables"] = _variables(chat, chat.reasoning_effort)
            return await self._render_foreign(chat, chat.template, variables, options)
        if own is None:
            raise RequestError("the model has no chat template: use completions", "messages")
        form, effort = _check_tools(chat, own), chat.reasoning_effort
        if isinstance(own, HarmonyTemplate):
            options["answer_format"] = chat.answer_format
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

    def _with_channels(self, call: GenerateCall, opened: str) -> GenerateCall:
        """The call of an answer in the Harmony format, with the grammar that it follows.

        Args:
            opened: the message that the prompt leaves open.
        """
        special_ids = self.require_tokenizer("tools").special_ids
        return replace(
            call,
            grammar=harmony_grammar(call.tools, special_ids, call.grammar, opened),
            tool_form=ToolForm.HARMONY,
            open_message=opened,
            skip_special_tokens=False,
        )

    def _with_form(
        self, call: GenerateCall, form: ToolForm, thinking: Thinking | None
    ) -> GenerateCall:
        """The call of any other answer."""
        use = call.tools
        if use is None and thinking is None:
            return call
        tokenizer = self.require_tokenizer("messages")
        has_marks = thinking is not None and not {BEGIN, END}.isdisjoint(tokenizer.special_ids)
        return replace(
            call,
            grammar=answer_grammar(use, form, tokenizer.mark_ids, call.grammar, thinking),
            tool_form=None if use is None else form,
            thinking=thinking,
            skip_special_tokens=call.skip_special_tokens and use is None and not has_marks,
        )

    def _thinking(
        self, chat: ChatInput, text: str, ids: tuple[int, ...], is_cut: bool
    ) -> Thinking | None:
        """Where the reasoning of the answer to a prompt begins; ``is_cut``: some tokens are not in
        ``ids``."""
        last = chat.messages[-1] if chat.continue_final_message else None
        shown = None if last is None else str(last.get("content") or "")
        if is_cut and ids:
            text = self.require_tokenizer("messages").decode(ids[-_LAST_TOKENS:], False)
        return thinking_after(text, shown)

    def _open_message(self, text: str, ids: tuple[int, ...], is_cut: bool) -> str:
        """The message that a prompt in the Harmony format leaves open.

        Args:
            text: the whole prompt.
            ids: its tokens, or those that are left of them.
            is_cut: some are not.
        """
        tokenizer = self.require_tokenizer("messages")
        special_ids = tokenizer.special_ids
        if all(mark in special_ids for mark in (START, MESSAGE, *ENDS)):
            return tokenizer.decode(open_header(ids, special_ids), skip_special_tokens=False)
        return open_message(tokenizer.decode(ids, skip_special_tokens=False) if is_cut else text)

    async def decode(self, ids: Sequence[int], facts: ModelFacts) -> str:
        """Text of token ids. Raises ``RequestError`` for one outside the vocabulary."""
        tokenizer = self.require_tokenizer("tokens")

        def decode() -> str:
            check_token_ids("tokens", ids, facts.vocab_size)
            return tokenizer.decode(ids, False)

        return await asyncio.to_thread(decode)

    async def bad_words(self, call: GenerateCall) -> tuple[tuple[int, ...], ...]:
        """Token sequences of each bad word, at the start of a text and after a space.

        A word of white space alone is taken as it is.

        Raises:
            RequestError: a word has no tokens, or there is no tokenizer.
        """
        if not call.bad_words:
            return ()
        encode = self.require_tokenizer("bad_words").encode
        forms: list[str] = []
        for word in call.bad_words:
            forms += [word.lstrip(), f" {word.lstrip()}"] if word.strip() else [word]
        found = await asyncio.to_thread(lambda: [encode(form, False) for form in forms])
        if not all(found):
            raise RequestError("bad_words has a word without tokens", "bad_words")
        return tuple(dict.fromkeys(found))

    async def make(
        self, call: GenerateCall, facts: ModelFacts
    ) -> tuple[GenerateCall, list[tuple[int, ...]]]:
        """The call, with the form of its tools; token ids of each prompt."""
        if call.chat is None:
            return call, await self._make_all(call, facts)
        rendered = await self.render(call.chat)
        text = rendered.text
        if call.truncate_prompt_tokens is None:
            self._check_length(text, facts, "messages")
        special = bool(call.add_special_tokens)
        kept = kept_tokens(call, facts)
        (encoded,) = await self._encode([text], facts, special, "messages", kept)
        if call.chat.template is not None and not encoded.num_tokens:
            raise RequestError(f"{PARAM} makes an empty prompt", PARAM)
        size = len(text) if call.tools is None else INLINE_SIZE + 1
        complete = await self._long_work.run(
            size, self._complete, call, call.chat, rendered, encoded
        )
        return complete, [encoded.ids]

    def _complete(
        self,
        call: GenerateCall,
        chat: ChatInput,
        rendered: RenderedChat,
        encoded: EncodedText,
    ) -> GenerateCall:
        """The call, with how the answer to its prompt is written."""
        ids, is_cut = encoded.ids, len(encoded.ids) < encoded.num_tokens
        if rendered.form is ToolForm.HARMONY:
            return self._with_channels(call, self._open_message(rendered.text, ids, is_cut))
        thinking = None
        if rendered.has_thinking:
            thinking = self._thinking(chat, rendered.text, ids, is_cut)
        return self._with_form(call, rendered.form, thinking)

    async def _make_all(self, call: GenerateCall, facts: ModelFacts) -> list[tuple[int, ...]]:
        special = call.add_special_tokens is not False
        kept, name = kept_tokens(call, facts), call.prompt_name
        if kept is not None:
            cut = await self._encode(call.prompts, facts, special, name, kept)
            return [one.ids for one in cut]
        return await self.make_ids(call.prompts, facts, special, name)

    async def make_ids(
        self,
        prompts: Sequence[str | tuple[int, ...]],
        facts: ModelFacts,
        add_special_tokens: bool,
        param: str,
    ) -> list[tuple[int, ...]]:
        """Token ids of texts and of token ids. Raises ``RequestError`` for what cannot fit."""
        for prompt in prompts:
            if isinstance(prompt, str):
                self._check_length(prompt, facts, param)
        found = await self._encode(prompts, facts, add_special_tokens, param)
        return [one.ids for one in found]

    async def _encode(
        self,
        prompts: Sequence[str | tuple[int, ...]],
        facts: ModelFacts,
        add_special_tokens: bool,
        param: str,
        kept: slice | None = None,
    ) -> list[EncodedText]:
        """Token ids of texts; token ids stay as they are. ``kept``: those that are wanted.

        Raises:
            ContextLengthError: a text has more tokens than any model takes, and none is cut.
        """
        most = max(MAX_TOKENS, facts.max_model_len)
        wanted = slice(most) if kept is None else kept
        if not any(isinstance(prompt, str) for prompt in prompts):  # also without a tokenizer
            return [
                EncodedText(one[wanted], len(one)) for one in prompts if not isinstance(one, str)
            ]
        found = await self._encoder.encode(prompts, add_special_tokens, wanted)
        for one in found:
            if kept is None and one.num_tokens > most:
                check_context(one.num_tokens, 0, facts, param)
        return found

    def _check_length(self, text: str, facts: ModelFacts, param: str) -> None:
        """Refuse a text that cannot fit before time is spent on it."""
        tokenizer = self.require_tokenizer(param)
        if tokenizer.is_surely_longer_than(text, facts.context_tokens):
            at_least = len(text) // tokenizer.max_token_chars
            check_context(at_least, 0, facts, param)


def _variables(chat: ChatInput, effort: str | None) -> Mapping[str, Any]:
    """Those of the template; ``reasoning_effort`` is also a field of its own."""
    given = chat.template_kwargs
    if effort is None or given.get("reasoning_effort") is not None:
        return given
    return {**given, "reasoning_effort": effort}


def _check_tools(
    chat: ChatInput, template: ChatTemplate | HarmonyTemplate | TemplateAnswer
) -> ToolForm:
    """How the template's model calls tools (any form where the conversation has none).

    Raises:
        UnsupportedParameterError: the conversation has tools, and the template none.
    """
    form = template.tool_form
    if chat.tools is not None and (form is None or not template.has_tools):
        takes = "tools in no known form" if template.has_tools else "no tools"
        reason = f"tools is not supported: the model's chat template takes {takes}"
        raise UnsupportedParameterError(reason, "tools")
    for place, message in enumerate(chat.messages):
        if not template.has_tools and message.get("tool_calls"):
            name = f"messages[{place}].tool_calls"
            reason = f"{name} is not supported: the model's chat template takes no tools"
            raise UnsupportedParameterError(reason, name)
    return form or ToolForm.HERMES
