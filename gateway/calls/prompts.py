"""Tokenizes texts and conversations; long texts are tokenized outside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from cluster.core.errors import RequestError
from gateway.calls.chat_renderer import ChatRenderer
from gateway.calls.output_rules import apply_output_rules
from gateway.calls.validate import check_context, check_token_ids, truncation_slice
from gateway.core.call import ChatInput, GenerateCall
from gateway.core.model import ModelFacts
from gateway.offload.long_work import INLINE_SIZE, LongWork
from gateway.text.encoding import (
    MAX_TOKENS,
    EncodedText,
    TextEncoder,
    check_num_tokens,
)
from gateway.text.render_template import PARAM
from gateway.text.tokenizer import Tokenizer, require_tokenizer


class PromptMaker:
    """Makes the token ids of prompts from texts, conversations or given token ids.

    Args:
        tokenizer: tokenizer of the model; if None, prompts must be token ids.
        trusts_templates: whether to render chat templates that clients send.
        long_work: runs long functions that hold the GIL.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, trusts_templates: bool, long_work: LongWork
    ) -> None:
        self.tokenizer = tokenizer
        self._long_work = long_work
        self._text_encoder = None if tokenizer is None else TextEncoder(tokenizer, long_work)
        self._chats = ChatRenderer(tokenizer, trusts_templates)

    @property
    def has_tools(self) -> bool:
        """Whether the model's chat template supports tools in a known format."""
        template = self.tokenizer.chat_template if self.tokenizer else None
        return template is not None and template.has_tools and template.tool_format is not None

    @property
    def _encoder(self) -> TextEncoder:
        self.require_tokenizer("prompt")
        assert self._text_encoder is not None, "there is a tokenizer"
        return self._text_encoder

    async def stop(self) -> None:
        """End the process that tokenizes long texts."""
        if self._text_encoder is not None:
            await self._text_encoder.stop()

    def require_tokenizer(self, param: str) -> Tokenizer:
        """Return the tokenizer. Without one, raises ``RequestError`` for the field ``param``."""
        return require_tokenizer(self.tokenizer, param)

    async def count_tokens(self, chat: ChatInput) -> int:
        """Return the number of tokens of a conversation, rendered with the chat template."""
        text = (await self._chats.render(chat)).text
        (encoded,) = await self._encoder.encode([text], False, slice(0))
        return encoded.num_tokens

    async def tokenize(
        self, text: str, chat: ChatInput | None, add_special_tokens: bool | None
    ) -> tuple[int, ...]:
        """Return the token ids of a text or of a conversation.

        By default, special tokens are added to texts but not to conversations.

        Raises:
            RequestError: the input has more than ``MAX_TOKENS`` tokens.
        """
        special = add_special_tokens is not False
        if chat is not None:
            text, special = (await self._chats.render(chat)).text, bool(add_special_tokens)
        (encoded,) = await self._encoder.encode([text], special, slice(MAX_TOKENS))
        check_num_tokens("prompt" if chat is None else "messages", encoded.num_tokens)
        return encoded.ids

    async def decode(self, ids: Sequence[int], facts: ModelFacts) -> str:
        """Return the text of token ids. Raises ``RequestError`` for ids outside the vocabulary."""
        tokenizer = self.require_tokenizer("tokens")

        def decode() -> str:
            check_token_ids("tokens", ids, facts.vocab_size)
            return tokenizer.decode(ids, False)

        return await asyncio.to_thread(decode)

    async def bad_words(self, call: GenerateCall) -> tuple[tuple[int, ...], ...]:
        """Return the token sequences of a call's bad words, which the output must not contain.

        Each bad word has a sequence at the start of a text and another after a space; a bad word
        that is only white space has one sequence.

        Raises:
            RequestError: a word has no tokens, or the model has no tokenizer.
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
        """Return a call with the rules for its output, and the token ids of each prompt.

        Only conversations have such rules (grammar, tool calls, reasoning). Raises
        ``RequestError``.
        """
        if call.chat is None:
            return call, await self._make_all(call, facts)
        rendered = await self._chats.render(call.chat)
        text = rendered.text
        if call.truncate_prompt_tokens is None:
            self._check_length(text, facts, "messages")
        special = bool(call.add_special_tokens)
        kept = truncation_slice(call, facts)
        (encoded,) = await self._encode([text], facts, special, "messages", kept)
        if call.chat.template is not None and not encoded.num_tokens:
            raise RequestError(f"{PARAM} makes an empty prompt", PARAM)
        size = len(text) if call.tools is None else INLINE_SIZE + 1
        complete = await self._long_work.run(
            size,
            apply_output_rules,
            call,
            call.chat,
            rendered,
            encoded,
            self.require_tokenizer("messages"),
        )
        return complete, [encoded.ids]

    async def _make_all(self, call: GenerateCall, facts: ModelFacts) -> list[tuple[int, ...]]:
        special = call.add_special_tokens is not False
        kept, name = truncation_slice(call, facts), call.prompt_name
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
        """Return the token ids of prompts. Raises ``ContextLengthError`` if a text is too long.

        ``param`` is the client's field, for error messages.
        """
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
        """Encode prompts to token ids, of which only the part ``kept`` is returned (None: all).

        Raises:
            ContextLengthError: a prompt that is not truncated has too many tokens for any model.
        """
        most = max(MAX_TOKENS, facts.max_model_len)
        wanted = slice(most) if kept is None else kept
        if any(isinstance(prompt, str) for prompt in prompts):
            found = await self._encoder.encode(prompts, add_special_tokens, wanted)
        else:  # works without a tokenizer
            ids = (prompt for prompt in prompts if not isinstance(prompt, str))
            found = [EncodedText(one[wanted], len(one)) for one in ids]
        for one in found:
            if kept is None and one.num_tokens > most:
                check_context(one.num_tokens, 0, facts, param)
        return found

    def _check_length(self, text: str, facts: ModelFacts, param: str) -> None:
        """Raise ``ContextLengthError``, before tokenization, if a text is certainly too long."""
        tokenizer = self.require_tokenizer(param)
        if tokenizer.is_surely_longer_than(text, facts.context_tokens):
            at_least = len(text) // tokenizer.max_token_chars
            check_context(at_least, 0, facts, param)
